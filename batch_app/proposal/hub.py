"""Describe a model on the hub from its small files; no weights are downloaded."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import NoReturn

from batch_app.errors import BadRequest, Forbidden, NotFound, ServerUnreachable
from batch_app.model_description import (
    ModelDescription,
    check_formats,
    downloaded_bytes,
    read_config,
    read_template,
)

TIMEOUT_S = 15.0
#: Read before the proposal; a few MB in all.
_SMALL_FILES = (
    "config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
)
_DEFAULT_ENDPOINT = "https://huggingface.co"


def read_hub(source: str, revision: str | None = None) -> ModelDescription:
    """Describe the model with this id on the hub.

    Raises:
        BadRequest: it can't be an id, or vLLM can't load the model's format.
        NotFound: the hub hasn't got the model, or not this revision.
        Forbidden: the model is gated or private, and HF_TOKEN doesn't open it.
        ServerUnreachable: the hub doesn't answer, or HF_HUB_OFFLINE is set.
    """
    # Imported here: it takes 0.3 s, and reads the environment only once.
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    endpoint = os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT
    try:
        info = HfApi(endpoint=endpoint).model_info(
            source, revision=revision or "main", files_metadata=True, timeout=TIMEOUT_S
        )
        sizes = {one.rfilename: one.size or 0 for one in info.siblings or ()}
        check_formats(source, sizes)
        with tempfile.TemporaryDirectory() as kept:
            # Not the hub's cache: there, the worker would take it for the whole model.
            folder = Path(kept)
            for name in _SMALL_FILES:
                if name in sizes:
                    hf_hub_download(
                        source,
                        name,
                        revision=info.sha,
                        local_dir=folder,
                        endpoint=endpoint,
                        etag_timeout=TIMEOUT_S,
                    )
            config, template = read_config(folder, source), read_template(folder)
    except HFValidationError as error:
        raise BadRequest(f"{source!r} is neither a folder nor an id on the model hub.") from error
    except OfflineModeIsEnabled as error:
        raise ServerUnreachable(
            f"{source} is not on this machine, and HF_HUB_OFFLINE forbids asking the model hub. "
            "Unset it, or give the model's folder."
        ) from error
    except HfHubHTTPError as error:
        _refused(source, revision, endpoint, error)
    except OSError as error:  # of the connection, or of a download that was cut short
        _unreachable(source, endpoint, error)
    except Exception as error:
        import httpx

        if not isinstance(error, httpx.HTTPError):
            raise
        _unreachable(source, endpoint, error)
    if not any(name.endswith(".safetensors") for name in sizes):
        raise BadRequest(
            f"{source} has no *.safetensors files, the only format of weights that is downloaded. "
            "Download it yourself, and give its folder."
        )
    return ModelDescription(
        source, config, template, sizes, downloaded_bytes(sizes), bool(info.gated)
    )


def _refused(source: str, revision: str | None, endpoint: str, error: Exception) -> NoReturn:
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        raise Forbidden(
            f"{source} is gated. {consent(source)} Then repeat this command with HF_TOKEN set.",
            code="gated_model",
        ) from error
    if isinstance(error, RevisionNotFoundError):
        raise NotFound(f"{source} has no revision {revision!r} on the model hub.") from error
    if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
        raise NotFound(
            f"There is no folder {source}, and the model hub ({endpoint}) has no such model for "
            "us. Correct the id; a private model needs HF_TOKEN."
        ) from error
    _unreachable(source, endpoint, error)


def _unreachable(source: str, endpoint: str, error: Exception) -> NoReturn:
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ServerUnreachable(
        f"The model hub ({endpoint}) can't be asked about {source} at the moment: {said} "
        "Try again, or give the model's folder."
    ) from error


def consent(source: str) -> str:
    """Say what a gated model needs."""
    endpoint = os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT
    return (
        f"Accept its licence at {endpoint}/{source}, create a token with read access there, and "
        "set HF_TOKEN to it, in the worker's environment too."
    )
