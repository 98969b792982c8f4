"""Every error this program raises on purpose.

    BatchAppError
    ├── ConfigError                a setting or the model registry cannot be used
    ├── BadRequest                 what the caller sent cannot be accepted          400
    │   ├── BadLines               … because of these lines of the input file       400
    │   ├── TooLarge               … because it exceeds a limit                      413
    │   ├── IdempotencyMismatch    … because its key belongs to another request      422
    │   └── UnsupportedMedia       … because of its content type or encoding         415
    ├── Unauthenticated            no API key, or none that opens anything          401
    ├── Forbidden                  the caller may not do this                       403
    ├── TooMany                    the caller has too much under way                429
    ├── TooSlow                    the caller's body does not arrive                408
    ├── NotFound                   no such batch or file                            404
    │   └── ModelNotFound          the model is not in the registry                 404
    ├── Conflict                   it exists, but its state forbids this            409
    │   └── KeyInUse               the same request is under way                    409
    ├── StorageFull                the disk (or its quota) is full                  507
    ├── StorageLost                the data folder was removed or replaced          503
    ├── StoreUnavailable           the database cannot be reached at the moment     503
    │   └── StoreLost              … or is not the one that was opened              503
    ├── ObjectsUnavailable         the object storage does not answer, or refuses   503
    ├── ServerUnreachable          the client found no server at its address
    ├── ServerFailed               the client got an answer that only a defect gives
    ├── LeaseLost                  another worker owns the batch now
    ├── IndexUnreadable            the index of an input file is missing, torn or outdated
    ├── ResultsLogError            the results log cannot be written any more
    └── EngineError
        ├── EngineLoadError        the model could not be loaded
        ├── EngineDied             the engine process ended by itself
        │   └── EngineOutOfMemory  … because it had too little memory
        ├── EngineHung             no progress for too long; it was killed
        ├── EngineUnavailable      the server that has the model doesn't work at the moment
        │   └── HubUnavailable     … or the hub that it has to be downloaded from
        └── EngineInterrupted      its owner wanted to stop while it was loading

`BadRequest` and its kin carry what the wire layer needs (`code`, `param`); the mapping to status
codes is in `routes/errors.py`, and a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Sequence

from batch_app.core import LineError, LoadRetry


class BatchAppError(Exception):
    """Base of all errors raised on purpose. The message is fit for the caller's eyes."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigError(BatchAppError):
    """A setting, or the model registry, cannot be used."""


class BadRequest(BatchAppError):
    """The caller's request cannot be accepted as it is."""

    def __init__(
        self, message: str, *, code: str = "invalid_request", param: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class BadLines(BadRequest):
    """Lines of the input file cannot run. `errors` holds the first of them, `num_errors` counts."""

    def __init__(self, message: str, errors: Sequence[LineError], num_errors: int) -> None:
        code = errors[0].code if errors else "invalid_request"
        super().__init__(message, code=code, param="file")
        self.errors = tuple(errors)
        self.num_errors = num_errors


class TooLarge(BadRequest):
    """A limit on size is exceeded; the message names the limit and its setting."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, code="file_too_large", param=param)


class UnsupportedMedia(BadRequest):
    """The content type, or the content's encoding, is not one that is taken here."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="unsupported_media_type")


class IdempotencyMismatch(BadRequest):
    """The Idempotency-Key was used before, for a request that said something else."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="idempotency_key_reused", param="Idempotency-Key")


class Unauthenticated(BatchAppError):
    """An API key is asked for, and this isn't one that opens anything.

    `key_id` is the key's that was once good, for the audit log; None where it never was, or none
    was given (`is_missing`).
    """

    code = "invalid_api_key"

    def __init__(
        self, message: str, *, key_id: str | None = None, is_missing: bool = False
    ) -> None:
        super().__init__(message)
        self.key_id = key_id
        self.is_missing = is_missing


class Forbidden(BatchAppError):
    """The caller may not do this. `scope` is the one that their key lacks, if that is why."""

    def __init__(
        self, message: str, *, code: str = "insufficient_scope", scope: str | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.scope = scope


class TooMany(BatchAppError):
    """The caller has too much under way. `repeatable`: trying again in `retry_after_s` may help."""

    def __init__(
        self, message: str, *, code: str, retry_after_s: int, repeatable: bool = True
    ) -> None:
        super().__init__(message)
        self.code = code
        self.retry_after_s = retry_after_s
        self.repeatable = repeatable


class TooSlow(BatchAppError):
    """The body of a request did not arrive in time. Nothing of it remains."""

    code = "request_timeout"


class NotFound(BatchAppError):
    """No such thing, or it isn't the caller's."""

    code = "not_found"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFound(NotFound):
    """The model is not in the registry."""

    code = "model_not_found"


class Conflict(BatchAppError):
    """The thing exists, but its state forbids what was asked. Doing it again won't help."""

    def __init__(self, message: str, *, code: str = "conflict") -> None:
        super().__init__(message)
        self.code = code


class KeyInUse(Conflict):
    """A request under the same Idempotency-Key has no answer yet. Retriable, unlike its kin."""

    def __init__(self, message: str) -> None:
        super().__init__(message, code="idempotency_key_in_use")


class StorageFull(BatchAppError):
    """There is no room on the disk. Nothing of what was being written remains."""


class StorageLost(BatchAppError):
    """The data folder is not the one that was opened. What is written to it now would be lost."""


class StoreUnavailable(BatchAppError):
    """The database does not answer at the moment. Retriable."""


class StoreLost(StoreUnavailable):
    """The database is not the one that was opened, or has other tables than this version's.

    Its message says what to do.
    """


class ObjectsUnavailable(BatchAppError):
    """The object storage does not answer at the moment, or refuses what was asked. Retriable."""


class ServerUnreachable(BatchAppError):
    """No server answers at the client's address, or it stopped answering."""


class ServerFailed(BatchAppError):
    """The server answered with an error of its own (`status` from 500), or with no API's answer."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class LeaseLost(BatchAppError):
    """Another worker owns the batch now: nothing this one writes may count any more."""


class IndexUnreadable(BatchAppError):
    """The index of an input file can't be read; it can be made anew from that file."""


class ResultsLogError(BatchAppError):
    """The results log could not be written. What was not committed must be run again."""


class EngineError(BatchAppError):
    """Something the engine did, as opposed to something one request did."""


class EngineLoadError(EngineError):
    """The model could not be loaded. `retriable` tells whether trying again can help.

    `retry`: how to try again at once, if memory was the reason; None if it wasn't.
    """

    def __init__(
        self, message: str, *, retriable: bool = False, retry: LoadRetry | None = None
    ) -> None:
        super().__init__(message)
        self.retriable = retriable
        self.retry = retry


class EngineDied(EngineError):
    """The engine process ended by itself. `exit_code` is negative for a signal, as Popen's."""

    def __init__(self, message: str, *, exit_code: int | None = None) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class EngineOutOfMemory(EngineDied):
    """The engine process ended because it had too little memory, of the device or the machine."""


class EngineHung(EngineError):
    """The engine made no progress for too long and was killed."""


class EngineUnavailable(EngineError):
    """The server that has the model doesn't work for us at the moment: the batch waits for it.

    `retry_after_s`: when to ask again, if the server said so. `model`: the registry's name of it.
    """

    def __init__(self, message: str, *, retry_after_s: float = 0.0, model: str = "") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.model = model


class HubUnavailable(EngineUnavailable):
    """The model is not on this machine, and the hub doesn't answer, or doesn't give it."""


class EngineInterrupted(EngineError):
    """Whoever owns the engine wanted to stop while the model was still loading."""
