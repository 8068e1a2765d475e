"""`python -m yaongi.eval tasks|fetch|report` as a person uses them."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from programs import run_module
from rich.console import Console

from yaongi.data.stages.fetch_benchmarks import BENCHMARKS
from yaongi.data.tokenizer import Tokenizer
from yaongi.eval.commands import Fetch
from yaongi.eval.evaluate import Settings, evaluate
from yaongi.eval.harness.suites import BASICS, INSTRUCTIONS, OWN, SUITES, Ask, asks
from yaongi.eval.report.page import write_page
from yaongi.eval.report.results import describe_model, read_results
from yaongi.eval.report.table import print_table
from yaongi.eval.scoring import ALONE
from yaongi.model import Yaongi

ROOT = Path(__file__).resolve().parents[2]
needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs lm-eval: pip install -e .[eval]")


def environment(tmp_path: Path, **more: str) -> dict[str, str]:
    """Return an environment without the hub, and with a cache of its own."""
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "120", **offline, **more}


def command(
    tmp_path: Path, *arguments: object, launcher: tuple[str, ...] = (), **more: str
) -> subprocess.CompletedProcess[str]:
    own = environment(tmp_path, **more)
    if not launcher:
        return run_module("yaongi.eval", *arguments, env=own)
    program = [sys.executable, *launcher, "-m", "yaongi.eval", *map(str, arguments)]
    return subprocess.run(program, capture_output=True, text=True, env=own, timeout=300)


@pytest.fixture(scope="module", autouse=True)
def offline(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Run without the hub, and with a cache of data sets of our own."""
    import datasets
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        yield


@pytest.fixture(scope="module")
def evaluated(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with results of our own suite, five questions a task."""
    out = tmp_path_factory.mktemp("evaluated") / "eval"
    evaluate(folder, [BASICS], Settings(out, limit=5), ALONE, print)
    return out


def test_results_hold_what_they_rest_on(evaluated: Path, folder: Path) -> None:
    found = read_results(evaluated)
    assert found["model"]["name"] == folder.parent.name
    assert len(found["model"]["weights"]) == len(found["model"]["tokenizer"]) == 64
    run = found["runs"][0]
    assert (run["dtype"], run["device"], run["processes"], run["prefix"], run["limit"]) == (
        "float32",
        "cpu",
        1,
        "none",
        5,
    )
    assert run["tokens"] > 1000
    assert 0.9 < run["fill"] <= 1
    whole = found["tasks"]["basics"]
    assert (whole["n"], len(whole["tasks"])) == (40, 8)
    values = [found["tasks"][task]["metrics"]["acc"]["value"] for task in whole["tasks"]]
    assert whole["metrics"]["acc"]["value"] == pytest.approx(sum(values) / 8)
    samples = [json.loads(line) for line in (evaluated / "samples" / "basics_copy.jsonl").read_text().splitlines()]
    assert len(samples) == 5
    best = [max(range(4), key=sample["log_likelihoods"].__getitem__) for sample in samples]
    assert [sample["acc"] for sample in samples] == [
        float(b == s["target"]) for b, s in zip(best, samples, strict=True)
    ]


def test_table(evaluated: Path) -> None:
    console = Console(width=200, record=True, force_terminal=True, file=open(os.devnull, "w"))  # noqa: SIM115
    results = read_results(evaluated)
    results["tasks"]["basics"]["metrics"]["acc"] = {"value": 0.5, "stderr": 0.079, "chance": 0.25, "distance": 3.65}
    results["tasks"]["basics_sum"]["metrics"]["acc"] = {"value": 0.3, "stderr": 0.2, "chance": 0.25, "distance": 0.26}
    results["tasks"]["basics_sum"]["cut"] = 3
    print_table(results, console)
    text = console.export_text()
    assert re.search(r"^basics +0 +40 +acc +50.0 ± 7.9 +25.0 +\+3.6 σ", text, re.MULTILINE), text
    assert re.search(r"^  basics_sum +0 +5 +acc +30.0 ± 20.0 \(chance\) +25.0 +\+0.3 σ", text, re.MULTILINE), text
    assert "LIMITED to the first 5 questions of each task" in text
    assert "basics_sum: 3 prompts were too long and lost their beginning" in text


def test_page_holds_several_models(evaluated: Path, tmp_path: Path) -> None:
    """Two checkpoints of a run: pictures, curves, a table, nothing from elsewhere."""
    later = tmp_path / "later"
    later.mkdir()
    results = read_results(evaluated)
    results["model"]["trained_tokens"] = 2_000_000
    (later / "results.json").write_text(json.dumps(results))
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    results["model"]["trained_tokens"] = 1_000_000
    results["model"]["name"] = "<b>model</b>"
    (earlier / "results.json").write_text(json.dumps(results))
    page = write_page([earlier, later], tmp_path / "page.html").read_text()
    assert page.count('src="data:image/png;base64,') == 3  # scores, tasks of basics, curves
    assert "basics against tokens" in page
    assert "LIMITED to the first 5" in page
    assert "&lt;b&gt;model&lt;/b&gt;" in page
    assert "<b>" not in page
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page)


def test_trained_tokens_come_from_the_run_s_log(folder: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """A half-written last line is left out; another damaged line is an error, until the tokens are told."""
    made = Path(shutil.copytree(folder, tmp_path / "model"))
    model, log = Yaongi.from_pretrained(made), tmp_path / "metrics.jsonl"

    def trained(told: int | None = None) -> int | None:
        return describe_model(made, model, tokenizer, told)["trained_tokens"]

    assert trained() is None
    log.write_text('{"event": "step", "tokens": 512}\n{"event": "evaluation"}\n{"event": "step", "tok')
    assert trained() == 512
    log.write_text('{"event": "step", "tokens": 512}\n{"event": "st\n{"event": "step", "tokens": 1024}\n')
    with pytest.raises(ValueError, match=r"line 2 of .*metrics.jsonl is damaged"):
        trained()
    assert trained(7) == 7


def test_bad_input(folder: Path, evaluated: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--suite must be among basics, instructions, quick, .*, code, got 'all'"):
        asks("all", (), None)
    assert asks("korean", (), None) == list(SUITES["korean"])
    assert asks("quick", (), 2)[1] == Ask("kmmlu_hard", 2)
    assert asks("basics", ("kmmlu", "basics", "instructions"), 3) == [Ask("kmmlu", 3), *OWN]
    assert asks("instructions", (), None) == [INSTRUCTIONS]
    done = command(tmp_path, "tasks", tmp_path, "--out", tmp_path / "out")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "folder must hold config.json" in done.stderr
    assert not (tmp_path / "out").exists()
    done = command(tmp_path, "report", tmp_path)
    assert "folder must hold results.json" in done.stderr
    results = json.loads((evaluated / "results.json").read_text())
    results["model"]["weights"] = "0" * 64
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "results.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="--out must hold no results of another model"):
        evaluate(folder, [BASICS], Settings(tmp_path / "other", limit=1), ALONE, print)


@pytest.mark.long
def test_a_killed_evaluation_goes_on(folder: Path, tmp_path: Path) -> None:
    """Kill -9 in the middle: the second run computes the rest, and the results are those of a straight run."""
    out = tmp_path / "eval"
    arguments = ["tasks", str(folder), "--limit", "8", "--rows-per-pass", "1"]
    program = [sys.executable, "-m", "yaongi.eval", *arguments, "--out", str(out)]
    started = subprocess.Popen(program, env=environment(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.monotonic() + 120
    lines = 0
    while lines < 5 and time.monotonic() < deadline:
        time.sleep(0.02)
        lines = sum(path.read_bytes().count(b"\n") for path in out.glob("progress/*.jsonl"))
    started.send_signal(signal.SIGKILL)
    started.wait()
    assert not (out / "results.json").exists()
    done = command(tmp_path, *arguments, "--out", out)
    assert done.returncode == 0, done.stderr
    assert re.search(r"going on: \d+ batches are in", done.stdout)
    straight = command(tmp_path, *arguments, "--out", tmp_path / "straight")
    assert straight.returncode == 0, straight.stderr
    assert same(out) == same(tmp_path / "straight")


def same(out: Path) -> dict[str, Any]:
    """Return what must be the same of two evaluations: all results and samples."""
    samples = {path.name: path.read_text() for path in (out / "samples").iterdir()}
    return {"tasks": read_results(out)["tasks"], "samples": samples}


@needs_lm_eval
def test_two_processes_give_the_same_file(plain_folder: Path, task_folder: Path, tmp_path: Path) -> None:
    """Our own suite and lm-eval's tasks with examples: the same results and samples to the bit, by the same prompts."""
    tasks = [
        "--tasks",
        "basics,own_group,own_texts,own_answers",
        "--shots",
        "2",
        "--limit",
        "6",
        "--include",
        task_folder,
    ]
    found = []
    for number in (1, 2):
        out = tmp_path / f"of{number}"
        launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone") if number == 2 else ()
        done = command(tmp_path, "tasks", plain_folder, "--out", out, *tasks, "--rows-per-pass", "1", launcher=launcher)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("own_group") == 1
        found.append(same(out))
        assert read_results(out)["runs"][0]["processes"] == number
    assert found[0] == found[1]
    entry = found[0]["tasks"]["own_group"]
    assert entry["tasks"] == ["own_letters", "own_choices"]
    assert set(entry["metrics"]) == {"acc", "acc macro"}
    assert entry["metrics"]["acc"]["chance"] == 0.25
    assert found[0]["tasks"]["own_letters"]["shots"] == 2
    assert "bits_per_byte" in found[0]["tasks"]["own_texts"]["metrics"]
    assert {"basics_copy.jsonl", "own_answers.jsonl"} < set(found[0]["samples"])


@pytest.mark.long
def test_one_of_several_processes_says_what_is_wrong(evaluated: Path, plain_folder: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone")
    done = command(tmp_path, "tasks", plain_folder, "--out", evaluated, launcher=launcher)
    assert done.returncode == 1
    assert done.stderr.count("error: eval: --out must hold no results of another model") == 1


@pytest.mark.long
@needs_lm_eval
def test_errors_of_tasks(plain_folder: Path, task_folder: Path, tmp_path: Path) -> None:
    """An unknown task, code without leave, too many examples, and data that is not there: one line each."""
    (tmp_path / "missing.yaml").write_text(
        "task: own_missing\ndataset_path: nobody/nothing\noutput_type: multiple_choice\ntest_split: test\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: ["A", "B"]\ndoc_to_target: answer\n'
    )
    for name, wanted in (
        ("own_letter", "--tasks must be names of lm-eval's tasks, got 'own_letter'; there are own_letters"),
        ("own_code", "own_code runs code that the model writes, without a sandbox: it needs --allow-code"),
        ("own_letters", "--shots must be at most the task's examples, got 6"),
    ):
        with pytest.raises(ValueError, match=re.escape(wanted)):
            evaluate(plain_folder, [Ask(name, 6)], Settings(tmp_path / "out", include=task_folder), ALONE, print)
    arguments = ["--include", tmp_path, "--tasks", "own_missing"]
    done = command(tmp_path, "tasks", plain_folder, "--out", tmp_path / "out", *arguments)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "python -m yaongi.eval fetch --tasks own_missing" in done.stderr


@needs_lm_eval
def test_fetch(task_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line per data set; one that can't be had is named, and the status is 1."""
    (tmp_path / "missing.yaml").write_text("task: own_missing\ndataset_path: nobody/nothing\ntest_split: test\n")
    assert Fetch(tasks=(("own_group",),), include=task_folder).run() == 0
    assert Fetch(tasks=(("own_missing",),), include=tmp_path).run() == 1
    said = capsys.readouterr().out
    assert "own_letters: test 12, dev 5 rows of json at no revision" in said
    assert "own_missing: NOT fetched: eval: the data of own_missing must be in the cache" in said


@needs_lm_eval
def test_a_local_copy(plain_folder: Path, task_folder: Path, tmp_path: Path) -> None:
    """KMMLU's own task, by its shipped file, on a clone in miniature: `--data-root` finds it by OWNER/NAME."""
    import lm_eval

    data = tmp_path / "copies" / "HAERAE-HUB" / "KMMLU"
    data.mkdir(parents=True)
    for split in ("dev", "test"):
        rows = map(json.loads, (task_folder / f"{split}.jsonl").read_text().splitlines())
        lines = [json.dumps({**row, "answer": row["answer"] + 1}, ensure_ascii=False) + "\n" for row in rows]
        (data / f"{split}.jsonl").write_text("".join(lines))
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: Accounting\n  data_files:\n  - {split: dev, path: dev.jsonl}\n"
        "  - {split: test, path: test.jsonl}\n---\n"
    )
    shipped = Path(lm_eval.__file__).parent / "tasks" / "kmmlu" / "default" / "_default_kmmlu_yaml"
    (tmp_path / "quiz.yaml").write_text(f"include: {shipped}\ntask: own_kmmlu\ndataset_name: Accounting\n")
    settings = Settings(tmp_path / "out", limit=3, include=tmp_path, data_root=tmp_path / "copies")
    found = evaluate(plain_folder, [Ask("own_kmmlu", 5)], settings, ALONE, print)
    assert found is not None
    entry = found["tasks"]["own_kmmlu"]
    assert (entry["n"], entry["shots"], entry["version"], entry["metrics"]["acc"]["chance"]) == (3, 5, "2.0", 0.25)
    assert entry["cut"] == 12  # five examples and a question are longer than this model reads
    sample = json.loads((tmp_path / "out" / "samples" / "own_kmmlu.jsonl").read_text().splitlines()[0])
    assert sample["prompt"].endswith("정답：")
    assert sample["choices"] == [" A", " B", " C", " D"]
    with pytest.raises(ValueError, match="--data-root must hold HAERAE-HUB/KMMLU"):
        evaluate(plain_folder, [Ask("own_kmmlu", 2)], replace(settings, data_root=tmp_path), ALONE, print)


@needs_lm_eval
def test_what_is_scored_is_never_trained_on() -> None:
    """Every data set of the suites is in the table of benchmarks that training text is compared with."""
    import lm_eval

    folder = Path(lm_eval.__file__).parent / "tasks"
    names = {ask.task.split("_")[0] for suite in SUITES.values() for ask in suite if ask not in OWN}
    texts = [path.read_text() for name in names for path in (folder / name).rglob("*") if "yaml" in path.name]
    paths = {path for text in texts for path in re.findall(r"^dataset_path: *(\S+)", text, re.MULTILINE)}
    scored = {path for path in paths if not path.startswith("evalplus/")} - {"HAERAE-HUB/KMMLU-HARD"}  # part of KMMLU
    assert len(scored) >= 7
    assert scored <= {benchmark.id for benchmark in BENCHMARKS.values()}


@needs_lm_eval
def test_questions_for_training_are_those_of_lm_eval(plain_folder: Path, task_folder: Path, tmp_path: Path) -> None:
    """The same prompts, choices and scores, in the form that a training run scores."""
    from yaongi.eval.choices import encode_items, measure, score_items
    from yaongi.eval.harness.task_data import load_tasks, task_manager
    from yaongi.eval.harness.task_items import task_items
    from yaongi.eval.lm_eval_adapter import YaongiLM

    asked = Ask("own_group", 2)
    found = evaluate(plain_folder, [asked], Settings(tmp_path / "out", include=task_folder), ALONE, print)
    assert found is not None
    items = task_items(load_tasks(task_manager(["own_group"], include=task_folder), "own_group"), asked.shots)
    lm = YaongiLM.load(plain_folder)
    outcomes = score_items(lm.scorer, items, encode_items(items, lm.tok_encode))
    for task in ("own_letters", "own_choices"):
        mine = measure([outcome for item, outcome in zip(items, outcomes, strict=True) if item.task == task])
        assert mine["n"] == 12
        for key in ("margin", "bits_per_byte"):
            assert mine[key] == pytest.approx(found["tasks"][task][key], rel=1e-5)
        assert mine["metrics"]["acc"] == found["tasks"][task]["metrics"]["acc"]
    with pytest.raises(ValueError, match="own_answers must be of multiple choice to be scored in training"):
        task_items(load_tasks(task_manager(["own_answers"], include=task_folder), "own_answers"), 0)
