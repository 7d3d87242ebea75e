"""Sphinx extension of this book: numbers come from run records, never from a keyboard."""

from __future__ import annotations

from pathlib import Path

from sphinx.util.fileutil import copy_asset

from .index import RecordsIndex
from .ledger import ClaimsLedger, ClaimsNotHolding
from .roles import DifferenceRole, PaperRole, RunRole, records_folder


def publish_records(app, exception) -> None:
    """Put the record files beside the pages, where the page of records links to them."""
    folder = records_folder(app)
    if exception is None and app.builder.format == "html" and folder.is_dir():
        copy_asset(folder, Path(app.outdir) / "_static" / "records", excluded=lambda path: path.endswith("LIST"))


def setup(app):
    app.add_config_value("advbn_records", "records", "env")
    app.add_role("run", RunRole())
    app.add_role("run-diff", DifferenceRole())
    app.add_role("paper", PaperRole())
    app.add_directive("records-index", RecordsIndex)
    app.add_directive("claims-ledger", ClaimsLedger)
    app.add_directive("claims-not-holding", ClaimsNotHolding)
    app.connect("build-finished", publish_records)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
