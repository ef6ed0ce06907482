"""An option declared at a config's field is on the command line, in recipes, in manifests and on cards."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import make_dataclass
from typing import Annotated, Any

import pytest
import typer
from support.command_line import cli, config_of
from typer.testing import CliRunner

from factorctl.cli.command import Asked, command
from factorctl.config.factorize import FactorizeConfig
from factorctl.config.finetune import FinetuneConfig
from factorctl.config.kinds import Listed, Single, kind_of
from factorctl.config.option import (
    EVERY_ROLE,
    BoundOption,
    Option,
    command_line,
    from_command_line,
    from_table,
    options_of,
    recorded,
)
from factorctl.errors import ExitCode, UsageError, together
from factorctl.pipeline.recipe.read import STAGES, parse_recipe
from factorctl.progress import SilentProgress

Coloured: Any = make_dataclass(
    "Coloured",
    [
        ("colour", Annotated[str, Option("Of the result.")], "red"),
        ("bucket", Annotated[int, Option("How much paint.", role="how", least=1, hint="try 3")], 3),
        ("shelf", Annotated[str, Option("Where it dries.", role="place")], "top"),
        ("tell", Annotated[str | None, Option("Whom to tell.", role="effect")], None),
        ("gloss", Annotated[bool, Option("Make it shine.")], True),
        (
            "coats",
            Annotated[str, Option("How often.", flags={"--two": ("2", "Twice."), "--three": ("3", "Three times.")})],
            "1",
        ),
    ],
    bases=(FactorizeConfig,),
    frozen=True,
)
"""The options of factorize, and some more, which no file of factorctl names."""

OPTIONS = [(verb, option) for verb, config in STAGES.items() for option in options_of(config)]


def invoke(*arguments: str) -> tuple[str, list[tuple[Any, Asked]]]:
    """What is printed, and what the command's body is given."""
    made: list[tuple[Any, Asked]] = []

    def body(config: Any, asked: Asked) -> None:
        """Paint it."""
        made.append((config, asked))

    app = typer.Typer(rich_markup_mode=None)
    app.command()(command(Coloured, body))
    return CliRunner().invoke(app, list(arguments), terminal_width=100, max_content_width=100).output, made


def test_help_tells_it() -> None:
    shown = " ".join(invoke("--help")[0].split())
    assert "Paint it." in shown
    for line in (
        "--colour <str> Of the result. [default: red]",
        "--bucket <int> How much paint. [default: 3]",
        "--shelf <str> Where it dries. [default: top]",
        "--tell <str> Whom to tell.",
        "--gloss / --no-gloss Make it shine. [default: gloss]",
        "--two Twice. --three Three times.",
    ):
        assert line in shown
    assert shown.index("--colour") < shown.index("--out")


def test_the_command_line_sets_it() -> None:
    line = "factorctl factorize demo --colour blue -n 8 --calibration-tokens 1K --no-gloss --three"
    config = config_of(line, Coloured)
    assert (config.colour, config.num_experts, config.calibration_tokens) == ("blue", 8, 1000)
    assert (config.gloss, config.coats) == (False, "3")
    assert config_of("factorctl factorize demo", Coloured) == Coloured(model="demo")
    _, [(_, asked)] = invoke("demo", "--dry-run", "--format", "json", "-q")
    assert asked == Asked(dry_run=True, output="json", quiet=True)


def test_a_recipe_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("factorctl.pipeline.recipe.read.STAGES", {**STAGES, "factorize": Coloured})

    def read(lines: str) -> Any:
        content = tomllib.loads(f"[factorize]\nmodel = 'demo'\n{lines}")
        return parse_recipe(content, default_name="mine", origin="recipe.toml").stages[0].config

    assert read("colour = 'blue'\nbucket = 4\ntell = 'me'\ngloss = false\ncoats = '2'") == Coloured(
        model="demo", colour="blue", bucket=4, tell="me", gloss=False, coats="2"
    )
    with pytest.raises(UsageError, match=r"\[factorize\] knows no 'colur'\nHint: did you mean 'colour'\?"):
        read("colur = 'blue'")
    with pytest.raises(UsageError, match="knows no 'shelf'"):
        read("shelf = 'below'")
    with pytest.raises(UsageError) as refused:
        read("bucket = 0\ncolour = 3\nseed = -1")
    assert refused.value.message.splitlines() == [
        "3 things are wrong:",
        "  recipe.toml: [factorize] colour = 3 is not text",
        "  recipe.toml: [factorize] --bucket 0 is no positive number (try 3)",
        "  recipe.toml: [factorize] --seed -1 is out of range (choose a number from 0 to 4294967295)",
    ]


def test_a_manifest_records_it_and_a_card_says_it() -> None:
    config = Coloured(
        model="demo", colour="light blue", bucket=4, shelf="below", tell="me", gloss=False, coats="2", overwrite=True
    )
    found = recorded(config)
    assert found["colour"] == "light blue"
    assert not {"out", "workspace", "overwrite", "bucket", "shelf", "tell"} & found.keys()
    line = command_line("factorize", Coloured, found, positional="demo")
    assert line == "factorctl factorize demo --colour 'light blue' --no-gloss --two"
    assert recorded(config_of(line, Coloured)) == found


def test_roles_decide_whether_a_stage_runs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from factorctl.pipeline.recipe.run import stage_key

    monkeypatch.setattr("factorctl.pipeline.recipe.run._source_identity", lambda *_: None)

    def key(**options: Any) -> str:
        return stage_key(Coloured(model="demo", **options), None, SilentProgress())

    assert key() == key(bucket=4) == key(shelf="below") == key(overwrite=True)
    assert len({key(), key(colour="blue"), key(tell="me")}) == 3


def test_all_faults_of_a_command_line_are_told_together() -> None:
    arguments = ("--experts", "many", "--gate", "sofmax", "--load-limit", "0.5", "--seed", "-1", "--option", "by")
    outcome = cli("factorize", "demo", *arguments, "--router", "random")
    assert (outcome.code, outcome.stdout) == (ExitCode.USAGE, "")
    assert outcome.stderr.splitlines() == [
        "error: 6 things are wrong:",
        "  --experts 'many' is not a whole number (for example --experts 8)",
        "  --option 'by' is no KEY=VALUE (for example --option by=activations)",
        "  --gate sofmax is not known (did you mean 'softmax'? Known: hard, softmax)",
        "  --load-limit 0.5 is out of range (choose 1 (even) or more, for example 1.5)",
        "  --seed -1 is out of range (choose a number from 0 to 4294967295)",
        "  --load-limit needs a fitted router (leave --router random out)",
    ]


def test_a_single_fault_stays_as_it_is() -> None:
    with pytest.raises(UsageError) as refused:
        FactorizeConfig("demo", calibration_tokens=0)
    assert (refused.value.message, refused.value.hint) == ("--calibration-tokens 0 is no positive number", "try 16384")


def test_faults_told_twice_are_told_once() -> None:
    again = together([UsageError("a", "b"), together([UsageError("a", "b"), UsageError("c")])])
    assert again.message == "2 things are wrong:\n  a (b)\n  c"


@pytest.mark.parametrize(("verb", "option"), OPTIONS, ids=lambda value: getattr(value, "field", value))
def test_every_option_explains_itself_and_its_default_reads_as_it_is_written(verb: str, option: BoundOption) -> None:
    for about in (option.option.help, *(about for _, about in option.option.flags.values())):
        assert about.endswith((".", "]"))
    if option.required or option.default is None:
        return
    assert option.kind.read(option.kind.written(option.default), option.flag) == option.default
    assert option.spelled(option.default) == []


@pytest.mark.parametrize(
    ("key", "given", "value"),
    [
        ("max-shard-size", "500MB", 500_000_000),
        ("max-shard-size", 500_000_000, 500_000_000),
        ("pad-experts", "32", 32),
        ("pad-experts", 32, 32),
        ("pad-experts", "auto", "auto"),
        ("accept-difference", 1, 1.0),
        ("verify_gguf", True, True),
        ("push", "someone/tiny", "someone/tiny"),
    ],
)
def test_a_recipe_takes_what_the_command_line_takes_and_toml_s_own(key: str, given: object, value: object) -> None:
    config = from_table(STAGES["export"], {key: given}, "[export]")
    assert [item for item in recorded(config, *EVERY_ROLE).values() if item == value and type(item) is type(value)]


@pytest.mark.parametrize(
    ("verb", "table", "words"),
    [
        ("export", {"max-shard-size": "much"}, "[export] max-shard-size 'much' is no size"),
        ("export", {"max-shard-bytes": 5}, "[export] knows no 'max-shard-bytes'"),
        ("profile", {"batch": "1,eight"}, "[profile] batch 1,eight is no list of whole numbers"),
        ("profile", {"batch": [1, 2.5]}, "[profile] batch = 2.5 is not a whole number"),
        ("profile", {"latency": "no"}, "[profile] latency = 'no' is not true or false"),
        ("finetune", {"loss": "kd=1"}, "[finetune] loss = 'kd=1' is not a table"),
        ("finetune", {"loss": {"kd": "much"}}, "[finetune] loss.kd 'much' is not a number"),
        ("finetune", {"track": ["tensorbord"]}, "[finetune] track tensorbord is not known"),
        ("eval", {"controls": True}, "[eval] controls = True is not one of none, fast, all"),
        ("eval", {"batch-size": True}, "[eval] batch-size = True is not a whole number or auto"),
    ],
)
def test_values_of_another_kind_are_refused(verb: Any, table: dict[str, object], words: str) -> None:
    with pytest.raises(UsageError) as refused:
        from_table(STAGES[verb], table, f"[{verb}]")
    assert refused.value.message.startswith(words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--speed-up 30%", "--speed-up '30%' is not a number hint: choose for example 1.3"),
        ("--keep 90%", "--keep '90%' is not a number hint: choose a share above 0, at most 1"),
        ("--calibration-tokens 4x", "is not a number of tokens hint: write a whole number, or one with K"),
    ],
)
def test_what_is_no_number_is_told_of_one_that_suits_the_option(given: str, words: str) -> None:
    outcome = cli("frontier", "demo", *given.split())
    assert outcome.code == ExitCode.USAGE
    assert words in outcome.message


def test_lists_are_read_alike_from_both() -> None:
    for batch in ([1, 8], "1,8", ["1", 8]):
        assert from_table(STAGES["profile"], {"batch": batch}, "[profile]") == STAGES["profile"]()
    assert from_table(STAGES["eval"], {"tasks": "piqa, sciq,"}, "[eval]") == STAGES["eval"](tasks=("piqa", "sciq"))  # type: ignore[call-arg]


@pytest.mark.parametrize("recorded_value", [["a"], {"a": 1}, "sofmax", True])
def test_a_card_leaves_out_what_no_command_line_takes(recorded_value: object) -> None:
    line = command_line("finetune", FinetuneConfig, {"gate": recorded_value, "betas": [0.9]}, positional="CHECKPOINT")
    assert line == "factorctl finetune CHECKPOINT"


def test_what_is_not_given_takes_the_default() -> None:
    given: dict[str, Sequence[str]] = {"model": ["demo"], "num_experts": [], "gate": []}
    assert from_command_line(FactorizeConfig, given) == FactorizeConfig("demo")


def test_an_annotation_says_the_kind() -> None:
    assert kind_of(int | None) is kind_of(int)
    assert kind_of(tuple[str, ...]).repeats
    assert not Listed(Single("<str>", "text", lambda text, _: text), "words", "a,b").repeats
