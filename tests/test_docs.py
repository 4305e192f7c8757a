"""The documentation: every code block is run, and the site is built with broken links as errors."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from page_blocks import Block, blocks, check_commands, run_page

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RUN = [page for page in PAGES if any(b.language in ("python", "bash") for b in blocks(page))]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, but for `configs/` and the miniature pair that it names."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "tca_fast").mkdir()
    (tmp_path / "tca_fast" / "miniature").symlink_to(ROOT / "tca_fast" / "miniature")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # A folder named tca_fast must not be taken for the package.
    monkeypatch.setenv("PYTHONSAFEPATH", "1")
    with torch.random.fork_rng(devices=[]):
        yield tmp_path


def stand_ins(folder: Path) -> None:
    """What the README says the tests put in the place of large models and a long run."""
    from tiny import tiny_qwen2
    from tiny_pair import character_tokenizer

    import tca_fast
    from tca_fast.adapter_config import Provenance
    from tca_fast.bridging.streams import build_streams

    tiny_qwen2(num_hidden_layers=4).save_pretrained(folder / "Qwen" / "Qwen2.5-Math-7B")
    tokenizer = character_tokenizer()
    base, target = (tiny_qwen2(seed, vocab_size=len(tokenizer)) for seed in (1, 2))
    for name, model in (("base", base), ("target", target)):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    streams = build_streams(base, target, tca_fast.AdapterConfig(num_features=9))
    names = Provenance(str(folder / "base"), None, str(folder / "target"), None, "target")
    streams.adapted.save_pretrained(folder / "runs" / "mine" / "adapter", names)


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_every_block_of_the_page_runs(page, folder):
    # Of kernels a submodule, because the repository has a folder of that name.
    for module, wanted in (("peft", "peft>=0.21"), ("kernels.layer", "kernels>=0.17")):
        imported = re.compile(rf"^from {module.partition('.')[0]} import", re.MULTILINE)
        if any(imported.search(block.code) and not block.not_run for block in blocks(page)):
            pytest.importorskip(module, reason=f"pip install '{wanted}'")
    if page.name == "README.md":
        stand_ins(folder)
    run_page(page, folder)


def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("mkdocs", "mkdocstrings_handlers"):
        pytest.importorskip(package, reason="pip install -e '.[docs]'")
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    reference = (tmp_path / "reference" / "index.html").read_text(encoding="utf-8")
    for name in ("tca_fast.attachment.attach", "tca_fast.config.TrainConfig"):
        assert f'id="{name}"' in reference
    for page in PAGES[1:]:
        name = "" if page.stem == "index" else page.stem
        assert (tmp_path / name / "index.html").is_file(), page


def test_links_of_the_readme_lead_somewhere():
    # Those between pages are checked by the build.
    links = re.findall(r"\]\(([^)#\s]+)[^)]*\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert local and not [link for link in local if not (ROOT / link).exists()]


class TestRunner:
    def page(self, folder, text):
        path = folder / "page.md"
        path.write_text(text)
        return path

    def test_blocks_share_names_and_files(self, folder):
        text = '```python\nx = 3\n```\n\n```yaml title="a.yaml"\nb: 1\n```\n\n'
        text += "```bash\ncat a.yaml > b.yaml\n```\n```python\n"
        text += "assert x == 3 and open('b.yaml').read() == 'b: 1\\n'\n```\n"
        run_page(self.page(folder, text), folder)

    @pytest.mark.parametrize(
        "block",
        [
            pytest.param("```python\nassert False\n```\n", id="python that fails"),
            pytest.param("```python\n# not run by the tests: why\nx = (\n```\n", id="no Python"),
            pytest.param("```bash\nfalse | cat\n```\n", id="bash that fails"),
            pytest.param("```bash\n# not run by the tests: why\nif\n```\n", id="no bash"),
            pytest.param("```python\nx = 1\n", id="open fence"),
        ],
    )
    def test_a_block_that_is_wrong_fails(self, folder, block):
        with pytest.raises((AssertionError, SyntaxError)):
            run_page(self.page(folder, block), folder)

    @pytest.mark.parametrize("command", ["tca-fast fly", "tca-fast pull a/b c --speed 3"])
    def test_a_command_that_does_not_exist_fails(self, command):
        with pytest.raises(AssertionError):
            check_commands(f"# not run by the tests: why\n{command}\n", "here")

    def test_a_block_without_a_reason_is_run(self):
        assert not Block("bash", None, "# not run by the tests:\nfalse\n", 1).not_run
