"""One self-contained page about a run: no script, nothing loaded from elsewhere, readable without a network, dark and light."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wse_emu.foundation.files import whole_file
from wse_emu.foundation.units import bytes_text, counted
from wse_emu.reports.cores_section import experts_section, kv_section, sram_section
from wse_emu.reports.markup import Child, Markup, join, table, tag
from wse_emu.reports.run import Run
from wse_emu.reports.traffic_section import passes_section, traffic_section
from wse_emu.reports.verdict_section import pill, verdict_section
from wse_emu.wafer.ledger import EDGE_KINDS, FABRIC_KINDS

if TYPE_CHECKING:
    from wse_emu.equivalence.report import VerifyReport

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
"""Even if something were smuggled into the page, a browser would neither run nor load it."""


class Passage(NamedTuple):
    """Prompt and continuation of one sequence: text, or token ids between blanks."""

    prompt: str
    generated: str = ""


def write_report(
    path: str | Path, run: Run, *, title: str, passages: Sequence[Passage] = (), verification: VerifyReport | None = None,
    host_seconds: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """Write the page about a run.

    Parameters
    ----------
    path : path
        Written anew, whole or not at all.
    run, title, passages, verification, host_seconds
        As for `report_html`.

    Raises
    ------
    OSError
        If the file cannot be written.
    """
    page = report_html(run, title=title, passages=passages, verification=verification, host_seconds=host_seconds)
    # A lone surrogate in text that somebody decoded badly is no reason to lose the report.
    with whole_file(path, errors="xmlcharrefreplace") as file:
        file.write(page)


def report_html(
    run: Run, *, title: str, passages: Sequence[Passage] = (), verification: VerifyReport | None = None,
    host_seconds: Mapping[str, float] | None = None,
) -> str:  # fmt: skip
    """The page about a run.

    Parameters
    ----------
    run : Run
        From `Run.of`, taken right after the call that the page is about.
    title : str
        For instance the model's name.
    passages : sequence of Passage
        What was said and generated, sequence by sequence. Untrusted: escaped, whatever it holds.
    verification : VerifyReport, optional
    host_seconds : mapping of str to float, optional
        How long the emulator took for what; shown apart from all emulated quantities.

    Returns
    -------
    str
        An HTML document.
    """
    sections = [
        Section("passes", "Forward passes", "Forward passes", passes_section(run)),
        Section("traffic", "Traffic", "What was streamed and moved", traffic_section(run)),
        Section("sram", "SRAM", "SRAM of the cores", sram_section(run)),
        Section("keys-and-values", "Keys and values", "Keys and values", kv_section(run)),
    ]
    if passages:
        sections.insert(0, Section("text", "Text", "Prompt and continuation", _text_section(passages)))
    if run.experts:
        sections.insert(-1, Section("experts", "Experts", "Load of the experts", experts_section(run)))
    if verification is not None:
        content = verdict_section(verification)
        sections.append(Section("equivalence", "Equivalence", "Equivalence with the float64 reference", content))
    sections.append(Section("machine", "Machine and model", "Machine and model", _machine_section(run)))
    if host_seconds:
        sections.append(Section("host", "Host seconds", "Host seconds, which say nothing about a wafer", _host_section(host_seconds)))
    return _document(title, _header(run, title, verification), sections)


class Section(NamedTuple):
    """One part of the page."""

    id: str
    link: str
    """Its name among the links at the top."""
    heading: str
    content: Markup


def _document(title: str, header: Markup, sections: Sequence[Section]) -> str:
    style = files("wse_emu.reports").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"{title}: wse-emu run"),
        tag("style", Markup(style)),
    )
    links = tag("nav", *(tag("a", s.link, href=f"#{s.id}") for s in sections))
    body = [tag("section", tag("h2", s.heading), s.content, id=s.id) for s in sections]
    end = tag("footer", "Quantities on this page were counted while the emulator ran. Time and power on a wafer are not modelled.")
    return f"<!doctype html>\n{tag('html', head, tag('body', tag('main', header, links, *body, end)), lang='en')}\n"


def _header(run: Run, title: str, verification: VerifyReport | None) -> Markup:
    model, high, capacity = run.model, int(run.sram.max()), run.wafer.sram_bytes_per_core
    shape = f"{model.family}, {counted(model.num_layers, 'layer')}, hidden size {model.hidden_size:,}"
    if model.is_moe:
        shape += f", {counted(model.num_experts, 'expert')}, top {model.top_k}"
    streamed, fabric = run.total("bytes", "stream"), run.total("bytes", *FABRIC_KINDS)
    tokens = sum(p.n_tokens for p in run.passes)
    edge, passes = run.total("bytes", *EDGE_KINDS), counted(len(run.passes), "forward pass", "forward passes")
    grid = f"{run.rows} \N{MULTIPLICATION SIGN} {run.cols}"
    tiles = [
        ("Grid", grid, f"{counted(run.rows * run.cols, 'core')} of {run.wafer.name}, executor {run.executor}"),
        ("Tokens through the wafer", f"{tokens:,}", f"{counted(run.kv.shape[1], 'sequence')}, {passes}"),
        ("Multiply-adds", f"{run.total('macs'):,}", "one fused multiply-add each"),
        ("Fullest core", f"{high / capacity:.1%}", f"{high:,} of {capacity:,} bytes"),
        ("Weights streamed", bytes_text(streamed), f"{streamed:,} bytes from MemoryX"),
        ("Moved between cores", bytes_text(fabric), f"{run.total('wavelets', *FABRIC_KINDS):,} wavelets"),
        ("Tokens in, logits out", bytes_text(edge), f"{edge:,} bytes over the wafer's edge"),
    ]
    if run.experts:
        tiles.append(("Chosen experts to MemoryX", bytes_text(run.total("bytes", "control")), "over the control channel"))
    return tag(
        "header",
        tag("p", "wse-emu, a functional emulator of a wafer-scale AI computer", class_="eyebrow"),
        tag("h1", tag("bdi", title)),
        tag("p", f"{shape}, {model.n_params:,} parameters", class_="lead"),
        pill(verification),
        tag("div", *(_tile(*tile) for tile in tiles), class_="tiles"),
    )


def _tile(name: str, value: str, words: str) -> Markup:
    return tag("dl", tag("dt", name), tag("dd", value), tag("dd", words), class_="tile")


def _text_section(passages: Sequence[Passage]) -> Markup:
    parts = [
        tag("pre", tag("bdi", tag("span", p.prompt, class_="prompt"), tag("span", p.generated, class_="made") if p.generated else None))
        for p in passages
    ]
    return join([tag("p", "The prompt, then marked what the model wrote.", class_="lead"), *parts])


def _machine_section(run: Run) -> Markup:
    wafer, model = run.wafer, run.model
    figures: list[Sequence[Child]] = []
    for field in fields(wafer):
        if field.name not in ("name", "sources"):
            figures.append([field.name, _value(getattr(wafer, field.name)), _source(wafer.sources.get(field.name))])
    shape = [tag("div", tag("dt", field.name), tag("dd", _value(getattr(model, field.name)))) for field in fields(model)]
    return join([
        tag("h3", f"Figures of the {wafer.name}, with their sources"),
        table(["figure", "value", "source"], figures, id="wafer-figures", style="words"),
        tag("h3", "Shape of the model"),
        tag("dl", *shape, class_="facts"),
    ])  # fmt: skip


def _value(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _source(source: str | None) -> Markup:
    """Where a figure comes from; what is assumed stands out."""
    if source is None:
        return tag("span", "no source stated", class_="badge open")
    assumed, _, why = source.partition("assumed:")
    if assumed:
        return join([source])
    return join([tag("span", "assumed", class_="badge open"), why])


def _host_section(host_seconds: Mapping[str, float]) -> Markup:
    rows: list[Sequence[Child]] = [[name.replace("_", " "), f"{seconds:.2f}"] for name, seconds in host_seconds.items()]
    words = "How long this emulator took on the computer that it ran on. No other number on this page depends on it."
    return join([tag("p", words, class_="lead"), table(["part", "seconds on the host"], rows, id="host-seconds", style="narrow")])
