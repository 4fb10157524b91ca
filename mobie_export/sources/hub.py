"""How does a model of the hub get here?"""

from pathlib import Path

from mobie_export.errors import NOT_FETCHED, UNSUPPORTED, MobieError

# What conversion reads, and what a card says of the source.
WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja", "README.md", "LICENSE*")
CODE_FILES = ("*.py",)  # with --trust-remote-code


def download(name: str, revision: str | None = None, trust_code: bool = False) -> Path:
    """A model of the hub, in the cache of huggingface_hub, where an interrupted download goes on. Raises MobieError."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import (
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as e:
        raise MobieError(
            UNSUPPORTED,
            "downloading needs a package that is not installed",
            str(e),
            "huggingface_hub",
            "pip install 'mobie-export[convert]', or give a folder or a GGUF",
        ) from e

    def failed(found: str, todo: str) -> MobieError:
        return MobieError(
            NOT_FETCHED, f"{name} could not be downloaded", found, f"a model at huggingface.co/{name}", todo
        )

    try:
        wanted = [*WANTED_FILES, *(CODE_FILES if trust_code else ())]
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=wanted))
    except GatedRepoError as e:
        raise failed("its owners want its terms accepted", "accept them there, then log in with `hf auth login`") from e
    except RepositoryNotFoundError as e:
        raise failed("no such model, or it is private", "check the name; a private model needs `hf auth login`") from e
    except LocalEntryNotFoundError as e:
        todo = "go online, or give a folder or a GGUF on this machine"
        raise failed("the hub cannot be reached, and the model is not in the local cache", todo) from e
    except (HfHubHTTPError, OSError) as e:
        first = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise failed(first, "run the command again: the download goes on where it stopped") from e
