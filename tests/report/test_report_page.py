"""The page: every section, self-contained, from whole runs and odd ones."""

import base64
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nano_pretrain.recipe.errors import UserError
from nano_pretrain.report import render_report
from tests.report.synthetic_run import MANY_SOURCES, SOURCES, write_lines, write_run

PICTURES = ("loss", "heldout", "learning_rate", "blend", "throughput", "grad_norm")
SECTIONS = (
    "headline",
    "loss",
    "heldout",
    "learning-rate",
    "blend",
    "throughput",
    "grad-norm",
    "samples",
    "environment",
)
FILES = {
    "recipe.yaml": "blend",
    "environment.json": "environment",
    "metrics.jsonl": "loss",
    "ledger.json": "blend",
    "exit.json": "headline",
    "validation.jsonl": "heldout",
    "baselines.json": "heldout",
    "samples.jsonl": "samples",
}


def _section(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}".*?</section>', page, re.DOTALL)
    assert found, name
    return found[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / "tiny", MANY_SOURCES)
    render_report(run)
    return run


@pytest.fixture(scope="module")
def page(finished: Path) -> str:
    return (finished / "report/index.html").read_text()


def test_every_section_is_there_in_order(page: str) -> None:
    assert tuple(re.findall(r'<section id="([^"]+)"', page)) == SECTIONS
    assert "missing" not in page.partition("<body>")[2]


def test_pictures_are_files_and_inlined(finished: Path, page: str) -> None:
    inlined = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    files = [(finished / f"report/{name}.png").read_bytes() for name in PICTURES]
    assert [base64.b64decode(data) for data in inlined] == files
    assert all(content.startswith(b"\x89PNG") for content in files)
    assert {path.name for path in (finished / "report").iterdir()} == {
        "index.html",
        *(f"{name}.png" for name in PICTURES),
    }


def test_nothing_is_fetched_from_outside(page: str) -> None:
    assert not re.search(r"<(script|link|iframe|object|embed)\b", page)
    assert all(address.startswith("data:image/png;base64,") for address in re.findall(r"\bsrc=\"([^\"]*)", page))
    assert not re.search(r"\b(href|srcset|action|background)=", re.sub(r"base64,[^\"]*", "", page))
    assert not re.search(r"url\(|@import|https?:", page)


def test_headline_numbers(page: str) -> None:
    headline = _section(page, "headline")
    for text in ("5.44M", "3.28M", "100.0 % of 3.28M, 400 steps", "MFU 31", "finished", "all tokens consumed"):
        assert text in headline
    assert re.search(r"below bigram \(2\.950\); \S+ % below trigram \(2\.550\)", headline)


def test_tables_name_every_source_and_phase(page: str) -> None:
    for section in ("heldout", "blend"):
        for name in MANY_SOURCES:
            assert f"<td>{name}</td>" in _section(page, section)
    assert re.search(r"<th>epochs</th><th>p1</th><th>p2</th><th>p3</th>", _section(page, "blend"))
    assert "<td>blend</td>" in _section(page, "heldout")
    assert "Interpolated n-grams on the same tokens." in _section(page, "heldout")


def test_environment_and_recipe_are_shown(page: str) -> None:
    section = _section(page, "environment")
    assert "<th>megatron_core</th><td>0.16.1" in re.sub(r">\s+", ">", section)
    assert "node-1, node-2" in re.sub(r"\s+", " ", section).replace(" ,", ",")
    assert "<summary>Resolved recipe</summary>" in section
    assert "warmup_tokens: 163840" in section


def test_rendering_again_gives_the_same_bytes(finished: Path, page: str) -> None:
    again = render_report(finished)
    assert again == finished / "report/index.html"
    assert again.read_text() == page


@pytest.mark.parametrize("suffixes", [(".json", ".yaml"), (".jsonl",)])
def test_sections_say_which_files_are_missing(tmp_path: Path, suffixes: tuple[str, ...]) -> None:
    run = write_run(tmp_path / "run", fraction=0.1)
    missing = [name for name in FILES if Path(name).suffix in suffixes]
    for name in missing:
        (run / name).unlink()
    page = render_report(run).read_text()
    for name, section in FILES.items():
        assert (f"{name} has not been written." in _section(page, section)) == (name in missing)
    assert tuple(re.findall(r'<section id="([^"]+)"', page)) == SECTIONS


def test_empty_directory_has_a_report(tmp_path: Path) -> None:
    page = render_report(tmp_path).read_text()
    assert all(f"{name} has not been written." in page for name in FILES)
    assert "<img" not in page
    assert "running or killed" in page


def test_directory_that_does_not_exist_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run"):
        render_report(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_report_that_cannot_be_written_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "report").write_text("a file")
    with pytest.raises(UserError, match="report: cannot be written"):
        render_report(tmp_path)


@pytest.mark.parametrize("content", ["", "\n\n", '{"step": 1, "tok'])
def test_metrics_without_a_whole_line(tmp_path: Path, content: str) -> None:
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(content)
    (run / "validation.jsonl").unlink()
    section = _section(render_report(run).read_text(), "loss")
    assert "No step with a loss has been recorded." in section
    assert "metrics.jsonl is empty." in section or "1 of 1 lines of metrics.jsonl cannot be read." in section


def test_torn_last_line_costs_only_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", fraction=0.25)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 101, "tokens": 82')
    page = render_report(run).read_text()
    assert "1 of 101 lines of metrics.jsonl cannot be read." in page
    assert "25.0 % of 3.28M, 100 steps" in page


def test_one_step(tmp_path: Path) -> None:
    page = render_report(write_run(tmp_path / "run", fraction=1 / 400)).read_text()
    assert page.count("<img") == len(PICTURES)
    assert "of 3.28M, 1 step<" in page


def test_steps_whose_loss_is_no_number(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", fraction=0.1)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    broken = (float("nan"), float("inf"), None, "oops")
    for line, value in zip(lines[10:], broken, strict=False):
        line["loss"] = value
    write_lines(run / "metrics.jsonl", lines)
    assert render_report(run).read_text().count("<img") == len(PICTURES)
    for line, value in zip(lines, itertools.cycle(broken), strict=False):
        line["loss"] = value
    write_lines(run / "metrics.jsonl", lines)
    assert "No step with a loss has been recorded." in render_report(run).read_text()
    assert not (run / "report/loss.png").exists(), "the picture of an earlier report must not stay"


def test_names_and_texts_are_escaped(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script>"
    run = write_run(tmp_path / "a <b> & 'c' $x$ _ü", (*SOURCES, "_$a$b$", "<img src=x>"), fraction=0.1)
    write_lines(run / "samples.jsonl", [{"tokens": 1, "prompt": evil, "text": evil + "\ud800 \x00 naïve"}])
    (run / "exit.json").write_text(json.dumps({"code": 1, "reason": evil}))
    (run / "environment.json").write_text(json.dumps({evil: [evil, {"deeper": evil}]}))
    with (run / "recipe.yaml").open("a") as file:
        file.write(f"# {evil}\n")
    page = render_report(run).read_text()
    assert "<script" not in page
    assert "<img src=x>" not in page
    assert "&lt;img src=x&gt;" in page
    assert "<h1>a &lt;b&gt; &amp; &#39;c&#39; $x$ _ü</h1>" in page
    assert "naïve" in page
    assert "failed (code 1)" in page


def test_what_was_told_in_mid_run_has_a_section(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", fraction=0.1)
    act = {"tokens": 1000, "field": "stages.pretrain.phases.p3.blend", "before": {"law": 1.0}, "after": {"c": 2.5}}
    write_lines(run / "recipe_history.jsonl", [act])
    with (run / "recipe_history.jsonl").open("a") as file:
        file.write('{"tokens": 20')
    section = _section(render_report(run).read_text(), "acts")
    cells = ("stages.pretrain.phases.p3.blend", "{law: 1.0}", "{c: 2.5}", "1,000")
    assert "".join(f"<td>{cell}</td>" for cell in cells) in section
    assert "1 of 2 lines of recipe_history.jsonl cannot be read." in section


def test_broken_documents_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", fraction=0.1)
    for name in ("ledger.json", "environment.json", "baselines.json", "exit.json"):
        (run / name).write_text('{"torn": ')
    (run / "recipe.yaml").write_text("a: [1, }")
    page = render_report(run).read_text()
    for name in ("ledger.json", "environment.json", "baselines.json", "exit.json", "recipe.yaml"):
        assert f"{name} is broken" in page


def test_finished_run_renders_without_torch(finished: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from nano_pretrain.report import render_report; "
        "render_report(Path(sys.argv[1])); assert not {'torch', 'megatron', 'matplotlib.pyplot'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(finished)], check=True)
