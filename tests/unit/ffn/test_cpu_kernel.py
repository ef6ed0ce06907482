"""The compiled CPU kernel against the definition in float64, when it may run, and what happens where it cannot."""

from __future__ import annotations

import copy
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_paths import TOKENS, choice, error, make_exact, make_ffn, plain_loop, tokens_for
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from factorctl.config.shape import FactorShape
from factorctl.errors import UsageError
from factorctl.ffn.choice import Site, path_at, shipped_steps
from factorctl.ffn.few_token_linear import linear, serves_kernel
from factorctl.ffn.kernel import compiling, cpu
from factorctl.ffn.kernel.compiling import NoKernelError, compiled_library
from factorctl.ffn.layer import FactoredFFN

needs_kernel = pytest.mark.skipif(not cpu.is_available(), reason=f"no kernel: {cpu.reason_without()}")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def frozen(**options) -> FactoredFFN:
    return make_ffn(**options).requires_grad_(False)


def check(ffn: FactoredFFN, x_TD: torch.Tensor) -> None:
    """Against the plain loop over the experts that torch's router chooses."""
    ffn.path = "kernel"
    ids_TK = choice(ffn, x_TD)
    expected = plain_loop(make_exact(ffn), x_TD.double(), ids_TK)
    y_TD = ffn(x_TD)
    assert y_TD.dtype == x_TD.dtype
    assert error(y_TD, expected) < TOLERANCE[x_TD.dtype]


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_token_counts(tokens: int, together: bool, dtype: torch.dtype) -> None:
    ffn = frozen(n=4, k=2, h=40, s=24, d=96, dtype=dtype)
    if together:
        ffn.down.data = ffn.down.data.t().contiguous().t()
    if tokens == 0:
        assert ffn(tokens_for(ffn, 0)).shape == (0, 96)
    else:
        check(ffn, tokens_for(ffn, tokens))


@needs_kernel
@pytest.mark.parametrize("threads", [2, 3, 7])
@pytest.mark.parametrize("tokens", [1, 2, 7, 65])
def test_threads_share_the_work(tokens: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    for k, d in ((2, 96), (4, 70), (0, 3)):
        ffn = frozen(n=4, k=k, h=40, s=24, d=d)
        for _ in range(2):
            check(ffn, tokens_for(ffn, tokens))
            ffn.down.data = ffn.down.data.t().contiguous().t()


@needs_kernel
@pytest.mark.parametrize("gate", ["softmax", "hard"])
@pytest.mark.parametrize(("n", "k"), [(4, 1), (4, 3), (4, 4), (64, 1), (64, 8), (64, 40)])
def test_experts_and_gates(gate: str, n: int, k: int) -> None:
    check(ffn := frozen(n=n, k=k, h=4, d=8, gate=gate, scale_a=n / k), tokens_for(ffn, 17))


@needs_kernel
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("k", [0, 2, 3])
@pytest.mark.parametrize(("h", "s", "d"), [(7, 5, 13), (1, 1, 1), (17, 33, 67), (300, 1100, 20), (16, 16, 300)])
def test_unaligned_sizes_and_static_pruning(h: int, s: int, d: int, k: int, together: bool) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ffn = frozen(n=3, k=k, h=h, s=s, d=d, dtype=dtype)
        if together:
            ffn.down.data = ffn.down.data.t().contiguous().t()
        for tokens in (1, 11, 50):  # few, some and many for each expert
            check(ffn, tokens_for(ffn, tokens))


@needs_kernel
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("h", [20, 150])  # fewer neurons than tokens, and more
def test_every_number_of_tokens_that_an_expert_may_get(h: int, together: bool) -> None:
    """Products are cut into tiles by token count: none is forgotten, none computed twice."""
    ffn = frozen(n=2, k=1, h=h, d=34)
    if together:
        ffn.down.data = ffn.down.data.t().contiguous().t()
    for tokens in (*range(1, 62), *range(190, 250, 3)):
        check(ffn, tokens_for(ffn, tokens))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_experts_and_shared_neurons_share_the_packed_tokens(dtype: torch.dtype) -> None:
    for k in (0, 1, 3):
        ffn = frozen(n=3, k=k, h=130, s=120, d=37, dtype=dtype)
        for tokens in (13, 23, 110, 119, 300):
            check(ffn, tokens_for(ffn, tokens))


@needs_kernel
@pytest.mark.parametrize("activation", sorted(cpu.ACTIVATIONS))
def test_activations_up_to_their_tails(activation: str) -> None:
    ffn = FactoredFFN(FactorShape(2, 1, 64, 0), 8, activation).requires_grad_(False)
    for parameter in ffn.parameters():
        torch.nn.init.normal_(parameter, std=8.0, generator=torch.Generator().manual_seed(3))
    x_TD = tokens_for(ffn, 50)
    ffn.path = "masked"
    expected = ffn(x_TD)
    ffn.path = "kernel"
    torch.testing.assert_close(ffn(x_TD), expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


@needs_kernel
def test_one_expert_takes_all_and_others_stay_empty() -> None:
    ffn = frozen(n=4, k=1, h=8)
    ffn.router.data.zero_()
    ffn.router.data[2, 0] = 1.0
    x_TD = tokens_for(ffn, 21)
    x_TD[:, 0] = x_TD[:, 0].abs() + 1
    check(ffn, x_TD)


@needs_kernel
def test_of_equal_logits_the_lower_experts_win() -> None:
    ffn = frozen(n=6, k=2, h=8)
    ffn.router.data.zero_()
    x_TD = tokens_for(ffn, 5)
    ffn.path = "kernel"
    expected = plain_loop(make_exact(ffn), x_TD.double(), torch.tensor([[0, 1]] * 5))
    assert error(ffn(x_TD), expected) < 1e-5


@needs_kernel
def test_a_chooser_decides_instead_of_the_router() -> None:
    ffn = frozen(n=4, k=2, h=8, s=8)
    x_TD, ids_TK = tokens_for(ffn, 3), torch.tensor([[3, 0], [1, 2], [2, 3]])
    ffn.chooser = lambda _: ids_TK
    ffn.path = "kernel"
    assert error(ffn(x_TD), plain_loop(make_exact(ffn), x_TD.double(), ids_TK)) < 1e-5


@needs_kernel
@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_chooser_that_names_no_expert_is_refused(wrong: int) -> None:
    ffn = frozen(n=4, k=2, h=8)
    kernel = ffn.kernel()
    with pytest.raises(IndexError, match="none of the 4"):
        kernel(tokens_for(ffn, 2), torch.tensor([[0, wrong], [1, 2]]), torch.ones(2, 2))


@needs_kernel
def test_what_is_not_a_number_stays_so_and_spoils_no_other_token() -> None:
    ffn = frozen(n=4, k=2, h=8, s=8)
    ffn.path = "kernel"
    x_TD = tokens_for(ffn, 8)
    healthy = ffn(x_TD)
    x_TD[3] = float("nan")
    y_TD = ffn(x_TD)
    assert y_TD[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6, 7]
    torch.testing.assert_close(y_TD[others], healthy[others])


@needs_kernel
@pytest.mark.parametrize("threads", [1, 2])
def test_results_repeat_bit_for_bit(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ffn = frozen(n=8, k=3, h=24, s=40, d=80)
    ffn.path = "kernel"
    x_TD = tokens_for(ffn, 33)
    first = ffn(x_TD)
    assert all(torch.equal(ffn(x_TD), first) for _ in range(5))


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 8, 1), (1, 300, 70), (5, 33, 19), (13, 64, 128)])
def test_linear(tokens: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, tokens, inputs, generator=generator).to(dtype)
    weight = torch.randn(outputs, inputs + 3, generator=generator).to(dtype)[:, :inputs]  # rows that lie apart
    bias_O = torch.randn(outputs, generator=generator).to(dtype) if bias else None
    exact = F.linear(x.double(), weight.double(), None if bias_O is None else bias_O.double())
    y = cpu.linear(x, weight, bias_O)
    assert y.shape == (1, tokens, outputs)
    assert error(y, exact) < TOLERANCE[dtype]


@needs_kernel
def test_linear_layers_take_it_for_few_tokens_without_gradient() -> None:
    weight = torch.randn(256, 256)
    assert serves_kernel(torch.randn(1, 256), weight)
    assert not serves_kernel(torch.randn(1, 256).requires_grad_(), weight)
    assert not serves_kernel(torch.randn(4096, 256), weight)
    assert not serves_kernel(torch.randn(0, 256), weight)
    assert not serves_kernel(torch.randn(1, 256), weight.t())
    assert not serves_kernel(torch.randn(1, 256).double(), weight.double())
    x = torch.randn(2, 256)
    torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=1e-4, atol=1e-4)


@needs_kernel
def test_it_serves_where_no_gradient_flows_and_nobody_watches() -> None:
    ffn = make_ffn(n=4, k=2, h=8, s=8)
    assert ffn.path_for(1) != "kernel", "weights that learn"
    with torch.no_grad():
        assert ffn.path_for(1) == "kernel"
        with torch.autocast("cpu", torch.bfloat16):
            assert ffn.path_for(1) != "kernel"
        with FlopCounterMode(display=False) as counter:
            ffn(tokens_for(ffn, 3))
        assert counter.get_total_flops() > 0, "counted, because torch computed it"
    ffn.requires_grad_(False)
    assert ffn.path_for(1) == "kernel"
    x_TD = tokens_for(ffn, 2).requires_grad_()
    ffn(x_TD).sum().backward()
    assert x_TD.grad is not None


@needs_kernel
@pytest.mark.parametrize("options", [{"bias": True}, {"dtype": torch.float64}, {"dtype": torch.float16}])
def test_layers_that_it_does_not_know_stay_with_torch(options: dict[str, object]) -> None:
    ffn = frozen(n=4, k=2, h=8, s=8, **options)
    assert ffn.path_for(1) != "kernel"
    ffn.path = "kernel"
    with pytest.raises(UsageError, match=r"path 'kernel' cannot run here: it takes float32 and bfloat16 on a CPU"):
        ffn(tokens_for(ffn, 2))


@needs_kernel
def test_exchanged_weights_are_noticed() -> None:
    ffn = frozen(n=4, k=2, h=8, s=8)
    ffn.path = "kernel"
    x_TD = tokens_for(ffn, 3)
    ffn(x_TD)
    twin = copy.deepcopy(ffn)
    other = frozen(n=4, k=2, h=8, s=8, seed=5)
    for name, parameter in other.named_parameters():
        getattr(ffn, name).data = parameter.data.clone()
    check(ffn, x_TD)
    check(twin, x_TD)
    ffn.top_k, ffn.gate, ffn.scale_a = 3, "hard", 2.0
    exact = make_exact(ffn)
    exact.top_k = 3
    assert error(ffn(x_TD), plain_loop(exact, x_TD.double(), ffn.route(x_TD).ids_TK)) < 1e-5


@needs_kernel
def test_shipped_ladders_begin_with_it_and_leave_many_rows_to_gemm_libraries() -> None:
    site = Site("a cpu", torch.float32, 2048, FactorShape(4, 1, 1408, 0), can_group=True, kernel=True)
    assert [path_at(shipped_steps(site), tokens) for tokens in (1, 16, 8192, 8193)] == ["kernel"] * 3 + ["grouped"]
    half = Site("a cpu", torch.bfloat16, 2048, FactorShape(4, 2, 1408, 0), can_group=True, kernel=True)
    assert path_at(shipped_steps(half), 1) == "kernel"
    assert path_at(shipped_steps(half), 4096) == "grouped"
    assert site.key != Site("a cpu", torch.float32, 2048, FactorShape(4, 1, 1408, 0)).key


@pytest.mark.skipif(platform.machine() != "x86_64" or not cpu.is_available(), reason="x86-64 with a compiler")
@pytest.mark.parametrize("march", ["x86-64", "x86-64-v3"])
def test_narrower_vectors_compute_the_same(march: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if march == "x86-64-v3" and "avx2" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX2")
    flags = tuple(f"-march={march}" if flag == "-march=native" else flag for flag in compiling.FLAGS)
    monkeypatch.setattr(compiling, "FLAGS", flags)
    monkeypatch.setenv("FACTORCTL_CACHE", str(tmp_path))
    library = cpu._library.__wrapped__()
    monkeypatch.setattr(cpu, "_library", lambda: library)
    for dtype in cpu.DTYPES:
        for d, k, s in ((67, 2, 33), (96, 4, 0), (5, 0, 3)):
            ffn = frozen(n=4, k=k, h=25, s=s, d=d, dtype=dtype)
            for tokens in (1, 8, 40, 90):
                check(ffn, tokens_for(ffn, tokens))


@needs_kernel
@pytest.mark.skipif(shutil.which("clang++") is None, reason="clang++ is not installed")
def test_clang_makes_the_same_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "clang++")
    monkeypatch.setenv("FACTORCTL_CACHE", str(tmp_path))
    library = cpu._library.__wrapped__()
    monkeypatch.setattr(cpu, "_library", lambda: library)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for dtype in cpu.DTYPES:
        ffn = frozen(n=4, k=2, h=25, s=33, d=67, dtype=dtype)
        for tokens in (1, 8, 40, 90):
            check(ffn, tokens_for(ffn, tokens))


@pytest.fixture
def asked_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and nothing remembered of this process's kernel until the test ends."""
    monkeypatch.setenv("FACTORCTL_CACHE", str(tmp_path))
    library = cpu._library.__wrapped__
    monkeypatch.setattr(cpu, "_library", lambda: library())
    return tmp_path / "kernels"


def reason() -> str | None:
    return cpu.reason_without.__wrapped__()


@pytest.mark.usefixtures("asked_anew")
def test_without_a_compiler_it_says_which_were_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    assert reason() == "no C++ compiler (c++, g++, clang++) is installed"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert reason() == "no C++ compiler (CXX=no-such-compiler) is installed"


def failing_compiler(tmp_path: Path, script: str) -> str:
    compiler = tmp_path / "compiler"
    compiler.write_text(f"#!/bin/sh\n{script}\n")
    compiler.chmod(0o755)
    return str(compiler)


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo cpu.cpp:1: error: no vectors here >&2; exit 1", "fails: cpu.cpp:1: error: no vectors here"),
        ("exit 3", "fails: exit status 3"),
        ("exit 0", "fails: "),
        ('while [ "$1" != -o ]; do shift; done; echo no library > "$2"', "it cannot be loaded: "),
    ],
)
def test_a_compiler_that_fails(
    script: str, expected: str, asked_anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", failing_compiler(tmp_path, script))
    assert expected in (reason() or "")


@needs_kernel
def test_a_kernel_that_crashes_is_not_kept(asked_anew: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a compiler took unaligned memory for aligned: another process finds out."""
    source = tmp_path / "crashing.cpp"
    crash = "{ *static_cast<volatile int *>(nullptr) = 1; return 0; }"
    source.write_text(f'extern "C" int factorctl_linear(...) {crash}\nextern "C" int factorctl_ffn(...) {crash}\n')
    monkeypatch.setattr(compiling, "SOURCE", source)
    monkeypatch.setattr(compiling, "SOURCES", (source,))
    assert reason() == "it ends the process that runs it (SIGSEGV)"
    assert not asked_anew.exists()


@needs_kernel
@pytest.mark.usefixtures("asked_anew")
def test_wrong_results_switch_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "linear", lambda x, weight: x @ weight.t() * 1.1)
    assert reason() == "it computes wrong torch.float32 products when compiled here"


def test_the_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FACTORCTL_KERNEL", "off")
    assert reason() == "FACTORCTL_KERNEL switches it off"


@needs_kernel
def test_a_damaged_library_is_made_again(tmp_path: Path) -> None:
    library = compiled_library(tmp_path)
    whole = library.read_bytes()
    library.write_bytes(whole[: len(whole) // 2])
    assert compiled_library(tmp_path).read_bytes() != whole[: len(whole) // 2]
    made = library.stat().st_mtime_ns
    assert compiled_library(tmp_path).stat().st_mtime_ns == made, "a whole one is kept"
    assert list(tmp_path.iterdir()) == [library], "one file, so that no two processes mix theirs"


@needs_kernel
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NoKernelError, match=r"it cannot be kept: .*file"):
        compiled_library(tmp_path / "file" / "kernels")


@needs_kernel
def test_it_runs_on_the_threads_that_torch_has_started() -> None:
    """Two pools would fight for the cores."""
    program = (
        "import os, torch\n"
        "torch.set_num_threads(2)\n"
        "torch.randn(512, 512) @ torch.randn(512, 512)\n"
        "from factorctl.ffn.kernel import cpu\n"
        "assert cpu.is_available()\n"
        "before = len(os.listdir('/proc/self/task'))\n"
        "cpu.linear(torch.randn(1, 512), torch.randn(512, 512))\n"
        "print(len(os.listdir('/proc/self/task')) - before)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "0", done.stderr
