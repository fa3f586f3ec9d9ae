"""`unlabeled methods` and `parameters`: what there is to ask for, with defaults and meaning."""

from typing import Annotated

import typer

from pipelines.options import Json
from pipelines.printing import print_json, print_parameters, print_table
from unlabeled.errors import InputError

app = typer.Typer()


@app.command("methods")
def methods_(
    name: Annotated[str, typer.Argument(metavar="METHOD", help="Show this method's settings.")] = "",
    as_json: Json = False,
) -> None:
    """List every learning signal: name, family, equation, paper; of one its settings, with default and meaning."""
    from unlabeled.signals import all_signals

    if name:
        _print_settings(name, as_json)
        return
    rows = [
        {"name": name, "family": signal.family, "equation": signal.equation, "paper": signal.paper}
        for name, signal in sorted(all_signals().items())
    ]
    if as_json:
        print_json(rows)
    else:
        print_table(rows, ["name", "family", "equation", "paper"])


def _print_settings(method: str, as_json: bool) -> None:
    from unlabeled.parameters import described
    from unlabeled.signals import find_signal, settings_model

    signal = find_signal(method)
    rows = described(settings_model(method), f"pretrain.{method}.")
    for section, defaults in (("training", signal.training_defaults), ("encoder", signal.encoder_defaults)):
        rows += [
            {
                "parameter": f"pretrain.{method}.{section}.{key}",
                "default": value,
                "meaning": f"the method's own default of {section}.{key}",
            }
            for key, value in defaults.items()
        ]
    if not as_json:
        print(f"{method}: {signal.family}, {signal.equation}; {signal.paper}")
    print_parameters(rows, as_json)


@app.command()
def parameters(
    section: Annotated[str, typer.Argument(help="Show only this section, as training.")] = "",
    as_json: Json = False,
) -> None:
    """List every parameter of a run with its default and meaning."""
    from unlabeled.parameters import Parameters, described, nearest

    rows = described(Parameters)
    sections = list(dict.fromkeys(row["parameter"].partition(".")[0] for row in rows))
    if section and section not in sections:
        raise InputError(f"unknown section '{section}'{nearest(section, sections)}")
    rows = [row for row in rows if not section or row["parameter"].partition(".")[0] == section]
    print_parameters(rows, as_json)
