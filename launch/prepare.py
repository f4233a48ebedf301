"""Fetch and tokenise all that a recipe needs, so that run and evaluation need no network.

    python launch/prepare.py --recipe NAME [--set section.key=value ...] [--no-models]

Models and hub datasets go to the hub cache (HF_HOME), tokens to data.cache_dir. Put both on a file
system that the compute nodes can read. With HF_HUB_OFFLINE=1 there, a missing file is an error at
once instead of a wait.
"""

from kd.cli import recipe_parser, run
from kd.data.dataset import load_data
from kd.data.tokenizers import load_tokenizers
from kd.evaluate.tasks import load_task
from kd.hub import download_model
from kd.logs import configure_logging
from kd.recipe import load_recipe


def main() -> None:
    parser = recipe_parser(
        "Fetch models and data of a recipe, tokenise the data, and report how many rows are kept "
        "and dropped."
    )
    parser.add_argument("--no-models", action="store_true", help="do not fetch the models' weights")
    args = parser.parse_args()
    configure_logging(rank=0)
    recipe = load_recipe(args.recipe, args.overrides)
    if not args.no_models:
        download_model("student.model", recipe.student, weights=recipe.student.init == "pretrained")
        if recipe.teacher is not None:
            download_model("teacher.model", recipe.teacher, weights=True)
    for task in recipe.evaluation.tasks:
        load_task(task)
    print(load_data(recipe, load_tokenizers(recipe)).report)


if __name__ == "__main__":
    run(main)
