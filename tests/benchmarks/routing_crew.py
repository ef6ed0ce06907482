"""Worker processes that do the jobs of the routing benchmark side by side, and the file that their results go to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from routing_cells import REPLY, Site


@dataclass(frozen=True)
class Job:
    """One piece of work for one worker."""

    name: str
    request: dict[str, Any]
    needs: str | None = None
    """The job whose result it builds on."""
    facts: dict[str, Any] | None = None
    """Goes into its record."""


class Results:
    """cells.jsonl: a record per job, appended as it ends."""

    def __init__(self, file: Path, copy: Path | None = None) -> None:
        self.file, self.copy, self._lock = file, copy, threading.Lock()
        if copy is not None and file.exists():
            shutil.copyfile(file, copy)

    def done(self) -> set[str]:
        return {record["name"] for record in read_results(self.file) if "error" not in record}

    def add(self, record: dict[str, Any]) -> None:
        with self._lock:
            for file in [self.file, *([self.copy] if self.copy else [])]:
                with file.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps(record) + "\n")


def read_results(file: Path) -> list[dict[str, Any]]:
    """Every whole record; the last one of each name."""
    records = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            record = json.loads(line)
        except ValueError:
            continue  # cut short by a kill
        records[record["name"]] = record
    return list(records.values())


class Crew:
    """Worker processes, and the jobs that they take in order as soon as what these need is done."""

    def __init__(self, site: Site, jobs: list[Job], results: Results, workers: int, seconds: float | None) -> None:
        self.site, self.results, self.waiting = site, results, list(jobs)
        self.begun = time.monotonic()
        self.deadline = None if seconds is None else self.begun + seconds
        self.unfinished = {job.name for job in jobs}
        self.finished, self.failed, self.running, self.over = 0, 0, 0, False
        self.change = threading.Condition()
        self.processes: list[subprocess.Popen[str]] = []
        self.threads = [threading.Thread(target=self._serve, args=(index,), daemon=True) for index in range(workers)]

    def work(self) -> int:
        """Do all jobs, or as many as the time allows; the number that failed."""
        for thread in self.threads:
            thread.start()
        try:
            for thread in self.threads:
                grace = None if self.deadline is None else max(0.0, self._last_moment() - time.monotonic())
                thread.join(grace)
        finally:
            self.over = True
            for process in self.processes:
                process.kill()
        return self.failed

    def _last_moment(self) -> float:
        assert self.deadline is not None
        return self.deadline + (self.deadline - self.begun) / 10

    def _serve(self, index: int) -> None:
        process: subprocess.Popen[str] | None = None
        with (self.site.home / f"worker-{index}.log").open("a", encoding="utf-8") as log:
            while (job := self._next()) is not None:
                if process is None or process.poll() is not None:
                    process = self._start(log)
                started = time.monotonic()
                result = self._asked(process, job)
                self._ended(job, result, time.monotonic() - started)

    def _start(self, log: IO[str]) -> subprocess.Popen[str]:
        command = [sys.executable, str(Path(__file__).with_name("routing_jobs.py")), json.dumps(asdict(self.site))]
        environment = os.environ | {"OMP_NUM_THREADS": str(self.site.threads), "TOKENIZERS_PARALLELISM": "false"}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )
        self.processes.append(process)
        self._reply(process)
        return process

    def _asked(self, process: subprocess.Popen[str], job: Job) -> dict[str, Any]:
        try:
            assert process.stdin is not None
            process.stdin.write(json.dumps(job.request) + "\n")
            process.stdin.flush()
        except BrokenPipeError:
            return {"error": f"the worker is gone, exit code {process.poll()}"}
        return self._reply(process)

    def _reply(self, process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(REPLY):
                reply: dict[str, Any] = json.loads(line.removeprefix(REPLY))
                return reply
        return {"error": f"the worker died, exit code {process.wait()}"}

    def _next(self) -> Job | None:
        """The first job whose base is there; None when no more are to be begun."""
        with self.change:
            while self.waiting:
                if self.deadline is not None and time.monotonic() > self.deadline:
                    return None
                for job in self.waiting:
                    if job.needs not in self.unfinished:
                        self.waiting.remove(job)
                        self.running += 1
                        return job
                if not self.running:
                    return None
                self.change.wait(timeout=1.0)
            return None

    def _ended(self, job: Job, result: dict[str, Any], seconds: float) -> None:
        if self.over:  # killed when the time was up: not done, and no fault of its own
            return
        record = {"name": job.name, **(job.facts or {}), **result}
        self.results.add(record)
        with self.change:
            self.running -= 1
            if "error" in result:
                self.failed += 1
                lost = [other for other in self.waiting if other.needs == job.name]
                self.waiting = [other for other in self.waiting if other not in lost]
                self.failed += len(lost)
            else:
                self.finished += 1
                self.unfinished.discard(job.name)
            self.change.notify_all()
        at = time.monotonic() - self.begun
        print(f"{at:7.1f} s  {seconds:6.1f} s  {job.name}  {summary(result)}", flush=True)


def summary(result: dict[str, Any]) -> str:
    """The numbers that tell at a glance whether a job went well."""
    if "error" in result:
        return result["error"][:300]
    words = []
    if documents := result.get("documents"):
        words.append(f"nats {sum(nats for nats, _ in documents) / sum(tokens for _, tokens in documents):.4f}")
    if found := result.get("finetune"):
        words.append(f"{found['tokens_per_second']:.0f} tok/s, {found['peak_memory_bytes'] / 1e9:.1f} GB")
        if found["router_agreement"] is not None:
            words.append(f"agreement {found['router_agreement_before']:.3f} -> {found['router_agreement']:.3f}")
    return ", ".join(words)
