"""The options that say which model is meant; every command has the same."""

import click

model_option = click.option(
    "--model",
    metavar="MODEL",
    help="A folder, a Hugging Face id, 0.5b, 7b, 72b or demo. Default: the embedded demo model.",
)
revision_option = click.option(
    "--revision", metavar="REV", help="A branch, tag or commit of a Hugging Face model."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Compute in this type. Default: the checkpoint's.",
)
