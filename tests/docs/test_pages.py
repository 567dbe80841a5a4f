"""The pages of the documentation: their code runs, their commands are understood, their links lead somewhere."""

import re
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import typer
import yaml
from markdown.extensions.toc import slugify, unique

from parscale.checkpoints.control_runs import SAME
from parscale.cli.application import app, run
from parscale.cli.options import repeat_list_options

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
READ_ELSEWHERE = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "scaling_laws/README.md")]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def blocks(path, language):
    return [code for found, code in BLOCK.findall(path.read_text(encoding="utf-8")) if found == language]


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name_of)
def test_the_code_runs(page, tmp_path, monkeypatch):
    """The Python of a page as it stands, in one namespace and an empty folder, offline."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{name_of(page)}, block {number}", "exec"), namespace)


@pytest.mark.nightly
def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    """The commands of the first tutorial, on the small model and less text."""
    from parscale.checkpoints import small_model_path, standard_library_split

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    training, held_out = standard_library_split()
    changes = {"Qwen/Qwen2.5-0.5B": str(small_model_path()), "1M": "8192"}
    for folder, documents in (("corpus", training[:4]), ("held-out", held_out[:3])):
        Path(folder).mkdir()
        for number, (_, text) in enumerate(documents):
            Path(folder, f"{number}.txt").write_text(text[:8_000])
        changes[f"{folder}/*"] = " ".join(map(str, sorted(Path(folder).iterdir())))
    text = "\n".join(blocks(DOCS / "tutorials" / "recycle.md", "sh")).replace("\\\n", " ")
    for there, here in changes.items():
        text = text.replace(there, here)
    for line in text.splitlines():
        assert run(shlex.split(line)[1:]) == 0, line
    assert "mean correlation" in capsys.readouterr().out
    assert Path("streams.png").stat().st_size > 0


def commands(path):
    """Each line that calls `parscale` in a page's code, put together where it is broken."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^(?:    )*(parscale [a-z].*?)(?: {2,}#.*)?$", text, flags=re.MULTILINE)


WRITTEN = [(name_of(path), line) for path in [*PAGES, *READ_ELSEWHERE] for line in commands(path)]


@pytest.mark.parametrize(("page", "line"), [item for item in WRITTEN if "..." not in item[1]])
def test_the_command_is_understood(page, line):
    words = shlex.split(line)[1:]
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.context_class(command)
    command.make_parser(context).parse_args(repeat_list_options(words, command.params))


def test_pages_show_more_than_20_commands():
    assert len(WRITTEN) > 20


SNIPPET = re.compile(r'^--8<-- "([^":]+)[^"]*"$', flags=re.MULTILINE)


def headings(path):
    """The anchors of a page, as mkdocs names them; those of the files that it includes too."""
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    text = SNIPPET.sub(lambda found: (ROOT / found[1]).read_text(encoding="utf-8"), text)
    taken: set[str] = set()
    found = re.findall(r"^#+ (.+?)\s*$", text, flags=re.MULTILINE)
    names = re.findall(r"^::: (\S+)$", text, flags=re.MULTILINE)
    return {unique(slugify(re.sub(r"\[(.*?)\]\(.*?\)|[`*]", r"\1", title), "-"), taken) for title in found} | set(names)


def links(path):
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"\w+:", link)]


@pytest.mark.parametrize("page", [*PAGES, *READ_ELSEWHERE], ids=name_of)
def test_the_links_lead_somewhere(page):
    for link in links(page):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        assert path.exists(), link
        if page.is_relative_to(DOCS):
            assert path.is_relative_to(DOCS), f"{link} leaves the site"
        if anchor and not anchor.startswith("only-"):
            made = "commands.md" in path.name and anchor.startswith("parscale-")
            assert made or anchor in headings(path), link


def test_every_page_is_in_the_menu():
    def files(entry):
        if isinstance(entry, str):
            return [entry]
        return [file for child in (entry.values() if isinstance(entry, dict) else entry) for file in files(child)]

    settings = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader=yaml.BaseLoader)
    listed = files(settings["nav"])
    assert sorted(listed) == sorted(page.relative_to(DOCS).as_posix() for page in PAGES)


def test_every_command_is_in_the_reference():
    namespace = SimpleNamespace(**__import__("runpy").run_path(str(ROOT / "tools" / "documentation.py")))
    page = namespace.on_page_markdown((DOCS / "reference" / "commands.md").read_text())
    for name in ("quickstart", "train", "law fit"):
        assert f"\n## parscale {name}\n" in page
    assert "| `--num-streams` |" in page
    for name, command in namespace.commands():
        section = page.partition(f"## {name}\n")[2].partition("\n## ")[0]
        for item in command.params:
            assert item.name == "help" or (item.help and item.help.split("|")[0] in section), (name, item.name)


@pytest.mark.parametrize(
    ("html", "count"),
    [
        ('<script src="https://unpkg.com/iframe-worker/shim"></script>', 1),
        ('<link rel="stylesheet" href=//fonts.example/a.css>', 1),
        ('<img alt="x" src=\'http://a/b.png\'> and <img src="assets/b.png">', 1),
        ('<a href="https://arxiv.org">paper</a> <link href="https://here/" rel="canonical"> <script src="x.js">', 0),
    ],
)
def test_what_a_page_would_fetch_is_found(html, count):
    tool = __import__("runpy").run_path(str(ROOT / "tools" / "documentation.py"))
    assert len(tool["fetched"](html)) == count


def test_what_controls_by_hand_have_to_share_is_what_controls_share():
    section = (DOCS / "training.md").read_text().partition("\n## Controls on several devices\n")[2]
    listed = re.search(r"must agree in (.*?):", section, flags=re.DOTALL)[1]
    assert tuple(re.findall(r"`(\w+)`", listed)) == SAME


def test_the_examples_are_listed():
    page = (DOCS / "examples.md").read_text()
    for path in [*ROOT.glob("examples/*.py"), *ROOT.glob("examples/*.ipynb")]:
        assert f"`{path.name}`" in page
