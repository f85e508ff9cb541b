"""README.md and the documentation: every code block runs, as `pages` describes, and the pages hold together."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from pages import PAGES, ROOT, Command, Workplace, blocks, commands

from hf_histo.adapter.sidecar import Sidecar
from hf_histo.config import OPTIONS
from hf_histo.config.packaged import COMMANDS, COMPLETION

NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in NAMES}
BLOCKS = {name: blocks(text, name) for name, text in TEXTS.items()}


def loaded(path: Path) -> ModuleType:
    """A module by its file, which is in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hooks = loaded(ROOT / "docs" / "hooks.py")


def with_blocks(*how: str) -> list[str]:
    return [name for name, found in BLOCKS.items() if any(block.how in how for block in found)]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture
def workplace(sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workplace:
    return Workplace(tmp_path / "work", sources, monkeypatch)


@pytest.mark.parametrize("name", with_blocks("run", "options", "slow"))
def test_the_blocks_of_a_page(name: str, workplace: Workplace) -> None:
    """Those that are slow have their options parsed here."""
    for block in BLOCKS[name]:
        if block.how != "none":
            workplace.run(block, only_options=block.how != "run")


@pytest.mark.slow
@pytest.mark.parametrize("name", with_blocks("slow"))
def test_a_page_with_its_slow_blocks(name: str, workplace: Workplace) -> None:
    for block in BLOCKS[name]:
        if block.how in ("run", "slow"):
            workplace.run(block)


@pytest.mark.slow
def test_the_main_job_of_the_readme(tmp_path: Path) -> None:
    """As it stands, without anything made small; the sizes that it prints are those that README.md shows."""
    command = [sys.executable, "-m", "accelerate.commands.launch", ROOT / "recipes" / "histo_lora.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines()[-5:]:
        if line.startswith(("trainable", "adapter")):
            assert f"\n{line}\n" in TEXTS["README.md"]
    assert (tmp_path / "runs/synthetic-builtin-lora-seed0/adapter/report.html").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```bash\nhf_histo doctor\n```", "page:1: no marker"),
        ("<!-- test: none -->\n```bash\nhf_histo doctor\n```", "page:2: expected a reason"),
        ("<!-- test: run; why -->\n```python\n```", "page:2: expected a reason"),
        ("<!-- test: run, DATA=mri -->\n```yaml\n```", "page:2: DATA=mri, expected DIR=KIND"),
    ],
)
def test_a_block_without_a_valid_marker_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        blocks(text, "page")


def test_commands_of_a_block() -> None:
    text = """A=1 accelerate launch --mixed_precision bf16 recipes/histo_lora.py --data DIR \\
        --seed 1    # a comment
    pip install -e ".[test]" && hf_histo doctor
    srun torchrun --nnodes 2 --rdzv_id $ID --rdzv_endpoint $(first | head -n1):29500 recipes/mri_lora.py
    accelerate launch -m hf_histo fine-tune"""
    assert list(commands(text)) == [
        Command("recipes/histo_lora.py", ["--data", "DIR", "--seed", "1"]),
        Command("hf_histo", ["doctor"]),
        Command("recipes/mri_lora.py", []),
        Command("hf_histo", ["fine-tune"]),
    ]


@pytest.mark.parametrize(
    "text",
    ["pip install 'hf_histo[nothing]'", "rm -rf /", "python recipes/missing.py", "accelerate launch --mixed bf16"],
)
def test_a_command_that_can_not_be_right_is_refused(text: str) -> None:
    with pytest.raises((ValueError, SystemExit)):
        list(commands(text))


def test_a_page_with_a_wrong_option_or_a_failing_command_fails(workplace: Workplace) -> None:
    for text, only_options in (
        ("hf_histo predict --adapte A", True),
        ("hf_histo predict --adapter A --data test.h5 --output o.csv", False),
    ):
        (block,) = blocks(f"<!-- test: run -->\n```bash\n{text}\n```", "page")
        with pytest.raises(AssertionError, match="page:2"):
            workplace.run(block, only_options=only_options)


# How the pages hold together.


def test_the_readme_is_short_and_ci_runs_its_test_command() -> None:
    lines = TEXTS["README.md"].splitlines()
    assert len(lines) <= 150
    command = lines[lines.index("**Install, and pass the tests:**") + 4]
    assert command == 'pip install -e ".[test]" && pytest'
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_to_files_and_headings(name: str) -> None:
    """Within the repository. On the site, `mkdocs build` checks them again."""
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        if found.parent == ROOT / "docs" / "about" and not found.exists():
            found = ROOT / hooks.BESIDE[found.stem]
        assert found.exists(), f"{name}: {target}"
        if anchor:
            text = hooks.filled(found.read_text(encoding="utf-8"))
            headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{name}: {target}"


def test_the_site_lists_every_page() -> None:
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r"[\w/]+\.md", settings.partition("\nnav:")[2]))
    pages = {name.removeprefix("docs/") for name in NAMES if name.startswith("docs/")}
    assert listed == pages | {f"about/{page}.md" for page in hooks.BESIDE}


# What is generated.


def test_every_option_and_command_is_in_the_reference() -> None:
    options, commands_page = (hooks.filled(TEXTS[f"docs/reference/{name}.md"]) for name in ("options", "commands"))
    assert all(f"| `--{name}` |" in options for name in OPTIONS)
    row = "| `--lora_rank` | `8` | whole number, more than 0 | rank of the update<br>*acts with --method lora; "
    assert row + "with --adapter other than boft" in options
    assert all(f"\n## hf_histo {command}\n" in commands_page for command in (*COMMANDS, COMPLETION))
    assert "recipes/" not in commands_page.partition("## hf_histo fine-tune")[2].partition("## Packaged")[0]


@pytest.mark.parametrize(
    ("experiment", "names"),
    [
        ("leave_one_center_out", {"pool_centers", "test_centers", "streaming"}),
        ("cross_validate", {"pool_centers", "test_centers", "streaming", "family"}),
        ("pareto", {"method", "target_modules"}),
        ("few_shot", {"shots", "percentage", "streaming", "aggregation", "data", "backbone"}),
        ("predict", set()),
    ],
)
def test_options_that_a_command_decides_are_found_in_the_code(experiment: str, names: set[str]) -> None:
    assert hooks.refused(experiment).keys() == names


def test_every_field_of_the_sidecar_has_a_meaning() -> None:
    text = hooks.sidecar()
    fields = [line.split(" | ") for line in text.splitlines() if line.startswith("| `")]
    assert {field.name for field in dataclasses.fields(Sidecar)} <= {cells[0].strip("| `") for cells in fields}
    assert [cells[0] for cells in fields if not cells[-1].strip(" |")] == []


def test_an_unknown_marker_is_an_error() -> None:
    with pytest.raises(KeyError):
        hooks.filled("<!-- generated: nothing -->")


def test_links_of_the_readme_for_the_package_index(tmp_path: Path) -> None:
    """`.ci/readme` makes relative links absolute; each leads to a file, and every image to its raw content."""
    for name in ("README.md", ".ci/readme"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    subprocess.run([tmp_path / ".ci" / "readme", "clinic/fork", "v1.2.3"], check=True)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", text)
    assert sum(1 for image, _ in links if image) >= 1
    for image, target in links:
        base = (
            "https://raw.githubusercontent.com/clinic/fork/v1.2.3/"
            if image
            else "https://github.com/clinic/fork/blob/v1.2.3/"
        )
        assert target.startswith(base), target
        assert (ROOT / target.removeprefix(base)).is_file(), target
