"""Cut a gpt-oss directory down to its first N decoder layers, so that slow tools can be timed side by side.

Usage: cut_layers.py MODEL_DIR DEST N
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file


def main() -> None:
    source, dest, layers = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    dest.mkdir(parents=True)
    config = json.loads((source / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "layer_types": config["layer_types"][:layers]}
    (dest / "config.json").write_text(json.dumps(config, indent=1))
    tensors = {}
    for shard in sorted(source.glob("*.safetensors")):
        with safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors handle is no mapping
                parts = name.split(".")
                if parts[1] != "layers" or int(parts[2]) < layers:
                    tensors[name] = file.get_tensor(name)
    save_file(tensors, dest / "model.safetensors", metadata={"format": "pt"})
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja") and path.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copyfile(path, dest / path.name)


if __name__ == "__main__":
    main()
