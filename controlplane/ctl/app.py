"""The command `ngpu` and its sub-commands."""

import json
import sys
from importlib.metadata import version as version_of
from typing import Annotated

import typer

from controlplane.ctl import (
    assets,
    explain,
    nodes,
    plan,
    prices,
    record,
    routes,
    simulate,
    tasks,
    tokens,
    usage,
    workspaces,
)

app = typer.Typer(
    name="ngpu",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
    help="""Talk to an NGPU control plane: deploy workspaces, give them tasks, look after nodes.

    \b
    First steps:
      ngpu node list                                  who takes part
      ngpu plan img2img.toml                          where it would run, and why
      ngpu workspace create img2img.toml --wait       deploy, and watch it come up
      ngpu task submit sdapi/v1/img2img -w img2img --file request.json --wait
      ngpu explain workspace img2img                  why it is where it is
    \b
    The control plane is $NGPU_SERVER or 127.0.0.1:50051; the token comes from $NGPU_TOKEN, $NGPU_TOKEN_FILE,
    ./.ngpu/controlplane/operator.token or ~/.config/ngpu/token. A workspace's id is a token for that workspace.
    \b
    Exit codes: 0 done, 1 failed, 2 wrong usage, 3 no answer, 4 not found, 5 not allowed, 6 no
    room (`ngpu plan`).
    """,
)
for _name, _module in (
    ("workspace", workspaces),
    ("route", routes),
    ("task", tasks),
    ("explain", explain),
    ("node", nodes),
    ("token", tokens),
    ("asset", assets),
    ("price", prices),
):
    app.add_typer(_module.app, name=_name)
app.command("plan")(plan.plan)
app.command("usage")(usage.usage)
# What it does not know itself it passes on.
app.command("simulate", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(simulate.simulate)
tasks.app.command("record")(record.record)


@app.command()
def version(as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False) -> None:
    """Print the version of this command."""
    number = version_of("ngpu")
    sys.stdout.write(json.dumps({"version": number}) + "\n" if as_json else f"ngpu {number}\n")
