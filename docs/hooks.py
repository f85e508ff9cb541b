"""Hook of MkDocs: the parts of the pages that describe the code are generated from the code.

A line `<!-- generated: NAME -->` of a page is replaced by the Markdown of the function NAME in `GENERATED`.
CHANGELOG.md, CONTRIBUTING.md and SECURITY.md, which stand beside `docs/`, become pages of the site.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from hf_histo.config.checks import needed
from hf_histo.config.options import FOR_CENTERS, GROUPS, rule_of
from hf_histo.config.packaged import ABOUT, COMMANDS, COMPLETION, PROGRAM, SHELLS, as_commands, recipes

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
MARKER = re.compile(r"^<!-- generated: (\w+) -->$", re.MULTILINE)
BESIDE = {"changelog": "CHANGELOG.md", "contributing": "CONTRIBUTING.md", "security": "SECURITY.md"}  # page: file
ROLES = {  # besides "result" and "source", which decide the result
    "place": "where something lies",
    "speed": "speed only",
    "output": "what is written beside the result",
}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the files beside `docs/`."""
    from mkdocs.structure.files import File

    for page, name in BESIDE.items():
        text = (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](../")
        files.append(File.generated(config, f"about/{page}.md", content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in what is generated."""
    return filled(markdown)


def filled(markdown: str) -> str:
    """A page with the generated text in place of its markers, and links to the pages of `BESIDE` instead of the files.

    Raises KeyError for an unknown marker.
    """
    for page, name in BESIDE.items():
        markdown = re.sub(rf"\]\(\.\./((?:\.\./)*){re.escape(name)}", rf"](\1about/{page}.md", markdown)
    return MARKER.sub(lambda marker: GENERATED[marker[1]](), markdown)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a bar in a cell is escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def options() -> str:
    """Every option of a run, by group."""
    parts = []
    for name, group in GROUPS.items():
        parts += [f"## {name.capitalize()}\n", option_table(group), ""]
    return "\n".join(parts)


def option_table(group: type[Any]) -> str:
    """The options of a dataclass: default, values, what each does, when it acts, and its role."""
    hints, rows = get_type_hints(group), []
    options = {option.name: option for option in dataclasses.fields(group)}
    everything = {option.name: option for kind in GROUPS.values() for option in dataclasses.fields(kind)}
    for name, option in options.items():
        rule = rule_of(option)
        known = everything | options
        acts = [needed(other, wanted, known[other].default) for other, wanted in rule.needs.items()]
        notes = [f"acts {'; '.join(acts)}"] if acts else []
        notes += [f"decides {ROLES[rule.role]}"] if rule.role in ROLES else []
        about = ["; ".join(filter(None, [option.metadata["help"], rule.details])), *(f"*{note}*" for note in notes)]
        is_required = option.default is dataclasses.MISSING and option.default_factory is dataclasses.MISSING
        default = "required" if is_required else value(default_of(option))
        default += f"; fine-tune: {value(FOR_CENTERS[name])}" if name in FOR_CENTERS else ""
        values = ", ".join(filter(None, [kind(hints[name]), rule.expected()]))
        rows.append([f"`--{name}`", default, values, "<br>".join(about)])
    return table(["option", "default", "values", "what it does"], rows)


def default_of(option: dataclasses.Field[Any]) -> Any:
    return option.default if option.default_factory is dataclasses.MISSING else option.default_factory()


def value(default: Any) -> str:
    """A default as on the command line."""
    if default is None or default == []:
        return "none"
    if isinstance(default, bool):
        return "on" if default else "off"
    return f"`{' '.join(map(str, default)) if isinstance(default, list) else default}`"


def kind(hint: Any) -> str:
    """The values of a type hint in words: the choices of a Literal, or number, text, switch."""
    if get_origin(hint) is Literal:
        return ", ".join(f"`{choice}`" for choice in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return ", ".join(kind(each) for each in get_args(hint) if each is not type(None))
    if get_origin(hint) is list:
        return f"{kind(get_args(hint)[0])}, one or more"
    return {bool: "switch", int: "whole number", float: "number", str: "text", Path: "path"}[hint]


def commands() -> str:
    """Each command: its help text, its own options, and the options of a run that it decides itself."""
    parts = []
    for command, (recipe, about) in COMMANDS.items():
        source = (recipes() / f"{recipe}.py").read_text(encoding="utf-8")
        tree = ast.parse(source)
        first, _, rest = as_commands(ast.get_docstring(tree) or "").partition("\n")
        parts += [f"## {PROGRAM} {command}\n", f"{about[0].upper()}{about[1:]}. {first}\n", rest.strip("\n"), ""]
        own = own_options(tree)
        calls = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        if calls & {"parse", "parse_with"}:
            parts += [f"Takes [the options of a run](options.md){', and' if own else '.'}\n"]
        if own:
            parts += [option_table(own), ""]
        if decided := refused(recipe):
            rows = [[f"`--{name}`", reason] for name, reason in decided.items()]
            parts += ["Refused here, since the command decides it:\n", table(["option", "reason"], rows), ""]
    parts += [f"## {PROGRAM} {COMPLETION}\n", f"{ABOUT[0].upper()}{ABOUT[1:]}: {', '.join(SHELLS)}.", ""]
    return "\n".join(parts)


def own_options(recipe: ast.Module) -> type[Any] | None:
    """The dataclass of a recipe's own options, by its import from `hf_histo.config.commands` or `.experiments`."""
    from hf_histo.config import commands, experiments

    for node in ast.walk(recipe):
        if isinstance(node, ast.ImportFrom) and node.module in (commands.__name__, experiments.__name__):
            names = [alias.name for alias in node.names if alias.name.endswith("Options")]
            if names:
                found: type[Any] = getattr(commands if node.module == commands.__name__ else experiments, names[0])
                return found
    return None


def refused(experiment: str) -> dict[str, str]:
    """The options that an experiment passes to `refuse` or `refuse_given` with a constant reason, by name."""
    places = [
        ROOT / "hf_histo" / "experiments" / f"{experiment}.py",
        *(ROOT / f"hf_histo/experiments/{experiment}").glob("*.py"),
    ]
    found: dict[str, str] = {}
    for place in filter(Path.is_file, places):
        tree = ast.parse(place.read_text(encoding="utf-8"))
        named: dict[str, ast.expr] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                named[node.targets[0].id] = node.value
        for node in ast.walk(tree):
            is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
            if is_call and node.func.id in ("refuse", "refuse_given") and len(node.args) == 2:
                found |= dict(reasons(node.args[1], named))
    return found


def reasons(node: ast.expr, named: Mapping[str, ast.expr]) -> Iterator[tuple[str, str]]:
    """The constant entries of a dict display, of `dict.fromkeys(NAMES, REASON)`, or of a variable with one of them."""
    if isinstance(node, ast.Name) and node.id in named:
        yield from reasons(named[node.id], {})
    elif isinstance(node, ast.Dict):
        for key, entry in zip(node.keys, node.values, strict=True):
            if key is None:
                yield from reasons(entry, named)
            elif isinstance(key, ast.Constant):
                text = entry if isinstance(entry, ast.Constant) else named.get(getattr(entry, "id", ""))
                if isinstance(text, ast.Constant):
                    yield str(key.value), str(text.value)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "fromkeys":
        names, text = node.args
        text = named.get(text.id, text) if isinstance(text, ast.Name) else text
        if isinstance(names, ast.Tuple) and isinstance(text, ast.Constant):
            yield from ((str(name.value), str(text.value)) for name in names.elts if isinstance(name, ast.Constant))


def peft_methods() -> str:
    """The methods of `--adapter`: layers, own options, source."""
    from hf_histo.models.peft_methods import METHODS

    rows = [
        [
            f"`{name}`",
            method.title,
            ", ".join(f"{kind}s" for kind in method.kinds),
            ", ".join(f"`--{option}`" for option in method.settings) or "none",
        ]
        for name, method in METHODS.items()
    ]
    return table(["`--adapter`", "method", "layers", "its options"], rows)


def configs() -> str:
    """The packaged configs by name, with the first sentence of the comment in each."""
    folder, rows = recipes() / "configs", []
    for file in sorted(folder.rglob("*.yaml")):
        lines = file.read_text(encoding="utf-8").splitlines()
        comment = " ".join(line.lstrip("# ") for line in leading_comments(lines) if line.strip("# "))
        sentence = re.split(r"(?<=[.:]) (?=[A-Z0-9])|  +", comment)[0] if comment else ""
        content = yaml.safe_load("\n".join(lines)) or {}
        if file.stem != "reported":
            about = sentence or ", ".join(f"{key} {content[key]}" for key in list(content)[:4])
            rows.append([f"`{file.relative_to(folder).with_suffix('').as_posix()}`", about])
    return table(["name", "what"], rows)


def leading_comments(lines: Sequence[str]) -> Iterator[str]:
    """The first lines that are comments."""
    for line in lines:
        if not line.startswith("#"):
            return
        yield line


def layouts() -> str:
    """Each layout of data: what is expected, and the options of reading that act on it."""
    from hf_histo.data.load import LAYOUTS

    rows = []
    for layout in LAYOUTS:
        acting = ", ".join(f"`--{name}`" for name in layout.OPTIONS) or "none"
        rows.append([layout.LAYOUT.replace("_", " "), layout.EXPECTED, acting])
    return table(["layout", "expected files", "options of reading that act"], rows)


def augmentations() -> str:
    """The augmentation presets, with what differs from none."""
    from hf_histo.transforms.augmentation import PRESETS

    rows = []
    for name, preset in PRESETS.items():
        changed = dataclasses.asdict(preset)
        plain = dataclasses.asdict(PRESETS["none"])
        strengths = [f"{key.replace('_', ' ')} {changed[key]}" for key in changed if changed[key] != plain[key]]
        rows.append([f"`{name}`", ", ".join(strengths) or "nothing"])
    return table(["preset", "what it does"], rows)


def target_modules() -> str:
    """The presets of `--target_modules` by architecture family, and each regex."""
    from hf_histo.models.lora_targets import FAMILIES

    rows = []
    for family, entry in FAMILIES.items():
        for name, regex in entry.presets.items():
            rows.append([family, f"`{name}`" + (" (default)" if name == entry.default else ""), f"`{regex}`"])
    return table(["family", "preset", "regex on the full name of a layer"], rows)


def foundation_models() -> str:
    """The registered foundation models."""
    from hf_histo.models.registry import ENTRIES

    rows = []
    for name, entry in ENTRIES.items():
        terms = "accept them on the Hub" if entry.terms else "none to accept"
        rows.append(
            [f"`{name}`", f"`{entry.source}`", entry.library, f"{entry.image_size}", entry.license, terms, entry.note]
        )
    return table(["name", "on the Hub", "library", "pixels", "license", "terms", "note"], rows)


def sidecar() -> str:
    """The fields of `hf_histo.json`: of `Sidecar` and of the records in it."""
    from hf_histo.adapter.sidecar import BackboneRecord, DataRecord, Sidecar
    from hf_histo.data.splits.checks import Composition
    from hf_histo.models.heads import HeadConfig
    from hf_histo.transforms.augmentation import TestTimeViews
    from hf_histo.transforms.color_shift import ColorRange
    from hf_histo.transforms.preprocessing import Preprocessing
    from hf_histo.transforms.stain import CenterNormalizer

    records = {
        "": Sidecar,
        "backbone": BackboneRecord,
        "preprocessing": Preprocessing,
        "head": HeadConfig,
        "normalizer": CenterNormalizer,
        "views": TestTimeViews,
        "colors": ColorRange,
        "data": DataRecord,
        "data.splits.NAME": Composition,
    }
    parts = []
    for place, record in records.items():
        parts += [f"### {place or 'the file'}\n", field_table(record), ""]
    return "\n".join(parts)


def field_table(record: type[Any]) -> str:
    """The fields of a dataclass, with the text about each in its docstring, bounds, and whether it may be missing."""
    from pydantic import TypeAdapter

    about = attributes(inspect.getdoc(record) or "")
    schema = TypeAdapter(record).json_schema()
    properties, required = schema.get("properties", {}), schema.get("required", [])
    rows = []
    for name in [field.name for field in dataclasses.fields(record)]:
        if name in properties:
            needed_here = "required" if name in required else "may be missing"
            rows.append([f"`{name}`", json_type(properties[name]), needed_here, about.get(name, "")])
    return table(["field", "type and bounds", "", "meaning"], rows)


def json_type(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "anyOf" in schema:
        return " or ".join(json_type(each) for each in schema["anyOf"])
    if "$ref" in schema:
        return "object, see below"
    words = {"array": "list", "object": "object", "number": "number", "integer": "whole number", "null": "null"}
    text = words.get(schema.get("type", ""), schema.get("type", "any"))
    bounds = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "minItems": "at least"}
    limits = [
        f"{word} {schema[key]}{' entries' if key == 'minItems' else ''}"
        for key, word in bounds.items()
        if key in schema
    ]
    if pattern := schema.get("pattern"):
        limits.append(f"`{pattern}`")
    return ", ".join([text, *limits])


def attributes(docstring: str) -> dict[str, str]:
    """The text about each attribute in a docstring of Google's style."""
    section = re.search(r"^Attributes:\n((?:    .*\n?|\n)*)", docstring, re.MULTILINE)
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=    \w)", section[1].rstrip() if section else ""):
        names, _, text = entry.strip().partition(": ")
        for name in names.split(", "):
            found[name] = " ".join(text.split())
    return found


def docstring_of(module: str) -> Callable[[], str]:
    """A function that returns the docstring of a module, in the Markdown that it is written in."""

    def docstring() -> str:
        path = ROOT / f"{module.replace('.', '/')}.py"
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        return text.partition("\n")[2].strip()

    return docstring


GENERATED: Mapping[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        *(options, commands, configs, layouts, augmentations, target_modules, peft_methods, foundation_models, sidecar),
    )
} | {
    "predictions": docstring_of("hf_histo.evaluation.predictions"),
    "intervals": docstring_of("hf_histo.evaluation.metrics.intervals"),
    "splits": docstring_of("hf_histo.data.protocol"),
}
