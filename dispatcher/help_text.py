"""How every command's --help looks."""

from __future__ import annotations

import argparse


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Show each option's default, also where it is none.

    Of a description or an epilog, paragraphs with an indented line (examples) stay as written;
    the others are filled.
    """

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        fill = super()._fill_text
        return "\n\n".join(
            paragraph if "\n " in f"\n{paragraph}" else fill(paragraph, width, indent)
            for paragraph in text.split("\n\n")
        )

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.required or "(default" in text or isinstance(action, argparse._HelpAction):
            return text
        has_none = action.default is None or action.default is False
        if has_none or action.default in ("", argparse.SUPPRESS) or action.default == []:
            return f"{text} (default: {'no' if action.nargs == 0 else 'none'})"
        return super()._get_help_string(action)
