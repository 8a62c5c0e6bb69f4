"""What the engine will ask of a checkpoint: of its small files before the work begins, of the whole at the end."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

from halfturn import _C
from halfturn.converter.checkpoint import Source, read_json
from halfturn.error import Error, quoted


def check_files(source: Source) -> None:
    """Raises Error for a tokenizer or a generation_config.json that the engine would refuse."""
    from halfturn.tokenizer import Tokenizer

    with TemporaryDirectory() as name:
        folder = Path(name)
        try:
            source.copy_tokenizer(folder)
            Tokenizer.from_folder(folder)
            _check_generation(folder / "generation_config.json", source.config.vocab_size)
        except Error as error:
            raise Error(str(error).replace(name, str(source.path))) from None
        except OSError as error:
            raise Error(f"the tokenizer of {source.path} can't be copied to {name}: {error}") from None
        except Exception as error:  # what the libraries make of files that are valid JSON and no tokenizer
            reason = f"{type(error).__name__}: {quoted(str(error), 300)}"
            raise Error(f"the tokenizer of {source.path} can't be used ({reason}); download the model again") from None


def _check_generation(file: Path, vocabulary: int) -> None:
    """The defaults that Model takes from generation_config.json, if there is one."""
    from halfturn.sampling import default_params

    if not file.is_file():
        return
    found = read_json(file, "correct it or remove it")
    try:
        default_params(found).validate(vocabulary)
    except Error as error:
        raise Error(f"{file} can't be used: {error}; correct it or remove the line") from None


def check_checkpoint(folder: Path) -> None:
    """Raises Error for a complete folder that the engine refuses."""
    try:
        _C.inspect(os.fsencode(folder))
    except Error as error:
        raise Error(
            f"the engine refuses the checkpoint that was made, so it was not kept: {error} (this is a fault in "
            "Halfturn; please report it)"
        ) from None
