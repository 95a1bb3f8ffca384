"""Docstrings say what they have to, and every block of code in README and docs/ is run."""

import ast
import inspect
import pkgutil
import re
import shlex
import shutil
import textwrap
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

import cebra_jax_metrics as cjm
from cebra_jax_metrics import demo

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# --- docstrings

MODULES = [
    import_module(module.name)
    for module in pkgutil.walk_packages(cjm.__path__, "cebra_jax_metrics.")
    if not module.name.endswith("__main__")
]
PUBLIC = {
    **{name: getattr(cjm, name) for name in cjm.__all__ if name != "samplers"},
    **{f"samplers.{name}": getattr(cjm.samplers, name) for name in cjm.samplers.__all__},
}
FUNCTIONS = {name: value for name, value in PUBLIC.items() if inspect.isroutine(value)}
CITING = ("alignment", "metrics", "nulls", "plotting", "uncertainty")  # CEBRA or papers
UNSOURCED = {"plot_distribution", "required_gap", "time_folds", "time_split"}  # nobody else's
SOURCED = {
    name
    for name, value in FUNCTIONS.items()
    if value.__module__.split(".")[1] in CITING and name not in UNSOURCED
}


def is_public(name):
    return not name.startswith("_")


def own(namespace, module):
    """Public functions and classes of a namespace that the module itself defines."""
    for name, value in vars(namespace).items():
        value = inspect.unwrap(getattr(value, "__func__", value))
        value = getattr(value, "fget", value)
        defined = inspect.isroutine(value) or inspect.isclass(value)
        if is_public(name) and defined and getattr(value, "__module__", None) == module.__name__:
            yield name, value


def section(docstring, title):
    """The lines below ``title:`` without their indentation, or nothing."""
    found = re.search(rf"^{title}:\n((?:(?: .*)?\n)*)", docstring + "\n", re.MULTILINE)
    return textwrap.dedent(found[1]) if found else ""


def entries(docstring, title):
    """What a section is about: the names before the colons."""
    lines = re.findall(r"^(\S[*\w., ]*):", section(docstring, title), re.MULTILINE)
    return [name.strip("* ") for line in lines for name in line.split(",")]


def documented(value):
    return inspect.cleandoc(value.__doc__ or "")


def parameters(function):
    return [name for name in inspect.signature(function).parameters if name != "self"]


def raised(function):
    """Exceptions that the body itself raises by name, not what it calls raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    raises = [node.exc for node in ast.walk(tree) if isinstance(node, ast.Raise) and node.exc]
    called = [node.func if isinstance(node, ast.Call) else node for node in raises]
    names = {node.id for node in called if isinstance(node, ast.Name)}
    return {name for name in names if name[0].isupper()}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_everything_public_has_a_docstring(module):
    assert module.__doc__
    missing = []
    for name, value in own(module, module):
        missing += [] if value.__doc__ else [name]
        if inspect.isclass(value):
            missing += [f"{name}.{x}" for x, method in own(value, module) if not method.__doc__]
    assert not missing


def missing_parts(name):
    """What the docstring of a public function or class has yet to say."""
    value, text = PUBLIC[name], documented(PUBLIC[name])
    if inspect.isclass(value):  # arguments where a user makes it, attributes where it is a result
        fields = getattr(value, "__dataclass_fields__", getattr(value, "_fields", ()))
        unnamed = set(fields) - set(entries(text, "Args")) - set(entries(text, "Attributes"))
        return {f"Attributes: {field}" for field in unnamed}
    names, signature = entries(text, "Args"), parameters(value)
    missing = {f"Args: {x}" for x in set(names) ^ set(signature)}
    if not missing and names != signature:
        missing.add("Args: order")
    returns = inspect.signature(value).return_annotation is not None
    if returns and not (section(text, "Returns") or section(text, "Yields")):
        missing.add("Returns")
    named = {x.rpartition(".")[2] for x in entries(text, "Raises")}
    missing |= {f"Raises: {x}" for x in raised(value) - named}
    if name in SOURCED and not re.search(r"^Sources?:", text, re.MULTILINE):
        missing.add("Source")
    return missing


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_docstrings_are_complete(name):
    assert missing_parts(name) == set()


def test_lists_name_what_exists():
    assert FUNCTIONS.keys() >= UNSOURCED


# --- code blocks


class Block(NamedTuple):
    page: str
    line: int
    mark: str | None  # of a comment above, <!-- mark -->
    language: str
    code: str


def blocks():
    pattern = r"^(?:<!-- ([^>]*?) -->\n)?```(.*)\n([\s\S]*?)^```$"
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(pattern, text, re.MULTILINE):
            line = text[: found.start(2)].count("\n") + 1
            yield Block(page.relative_to(ROOT).as_posix(), line, *found.groups())


BLOCKS = list(blocks())
OUTPUT = {"demo output": "tests/test_readme.py"}
RUN_ELSEWHERE = {  # by its mark, in a file that names the mark
    "demo": ".ci/run",
    "test": ".ci/run",
    "drop-in example": "tests/test_readme.py",
    "fit example": "tests/test_readme.py",
    "mesh example": "tests/test_readme.py",
}
NOT_RUN = {  # how the block begins, and why
    "python examples/many_hosts.py": "two processes: tests/test_sharding.py runs the example",
    "srun ": "a cluster; tests/test_sharding.py runs the example",
}
FASTER = {"test": "--num-samples 3 --num-batches 2", "fit": "--num-steps 2 --batch-size 8"}


def is_doctest(block):
    return block.language == "python" and block.code.lstrip().startswith(">>> ")


def commands(block):
    """The lines of a block of nothing but this package's command, or None."""
    lines = block.code.splitlines()
    is_command = block.language == "sh" and all(x.startswith("cebra-jax-metrics ") for x in lines)
    return [shlex.split(line, comments=True)[1:] for line in lines] if is_command else None


def is_run_here(block):
    return block.mark is None and block.language == "python" and not is_doctest(block)


def test_every_block_is_run(request):
    globs = [x for x in request.config.getini("addopts") if x.startswith("--doctest-glob=")]
    assert {"--doctest-glob=README.md", "--doctest-glob=docs/*.md"} <= set(globs)
    assert {"README.md", "docs"} <= set(request.config.getini("testpaths"))
    elsewhere = RUN_ELSEWHERE | OUTPUT
    unknown = [
        f"{block.page}:{block.line}"
        for block in BLOCKS
        if not (is_doctest(block) or commands(block) or is_run_here(block))
        and block.mark not in elsewhere
        and not block.code.startswith(tuple(NOT_RUN))
    ]
    assert not unknown, "a block that nothing runs: make it a doctest, or mark it and name it here"
    marks = [block.mark for block in BLOCKS]
    for mark, file in elsewhere.items():
        assert marks.count(mark) == 1, mark
        assert re.search(rf"\b{mark}\b", (ROOT / file).read_text()), f"{file} does not run {mark}"
    for start in NOT_RUN:
        assert any(block.code.startswith(start) for block in BLOCKS), f"no block begins {start!r}"


@pytest.mark.parametrize(
    "block", [x for x in BLOCKS if is_run_here(x)], ids=lambda block: f"{block.page}:{block.line}"
)
def test_python_block_runs(block):
    exec(block.code, {})


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files that the commands of README and of its page name."""
    monkeypatch.chdir(tmp_path)
    place_cells = demo.load_demo()
    trained = Path(demo.__file__).parent / "place_cells.pt"
    recording = {"spikes": place_cells.spikes, "position": place_cells.position}
    recording = {name: np.tile(x, (3, 1)) for name, x in recording.items()}  # of 12 000 steps
    for name in ("model", "models/a", "models/b"):
        Path(name).parent.mkdir(exist_ok=True)
        shutil.copy(trained, f"{name}.pt")
    for name in ("recording", "rats/a", "rats/b"):
        Path(name).parent.mkdir(exist_ok=True)
        np.savez(f"{name}.npz", **recording)
    rng = np.random.default_rng(0)
    for name in ("a", "b", "c", "run_1", "run_2"):
        np.save(f"{name}.npy", rng.normal(size=(100, 3)))


def expanded(arguments):
    """What a shell would make of patterns."""
    for argument in arguments:
        yield from sorted(map(str, Path().glob(argument))) if "*" in argument else [argument]


@pytest.mark.heavy
@pytest.mark.usefixtures("files")
def test_commands_run(run):
    for command in dict.fromkeys(tuple(x) for block in BLOCKS for x in commands(block) or ()):
        faster = FASTER.get(command[0], "").split()
        code, out, err = run(*expanded(command), *faster)
        assert (code, bool(out)) == (0, True), f"{' '.join(command)}: {err}"
