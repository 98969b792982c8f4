"""A native submission, from the first byte of the request's body to the queued batch.

The file passes the line check on its way where the form names the model before the file; else the
check reads the file when it has arrived: the order is the user's. The batch exists from the insert
on, after its files are durable.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

from batch_app import tracing
from batch_app.batch_log import BatchLog
from batch_app.core import Batch, BatchStatus, Dialect, FilePurpose, Idempotency, StoredFile
from batch_app.errors import BadRequest
from batch_app.faults import crash_point
from batch_app.files import (
    move_durably,
    new_id,
    no_room_is_storage_full,
    sync_dir,
    wake_workers,
)
from batch_app.idempotency import FormFingerprint
from batch_app.incoming import Incoming, UploadServices
from batch_app.intake import Intake, IntakeRules, IntakeSummary, index_file
from batch_app.registry import ModelEntry
from batch_app.shapes import BodyLimits
from batch_app.shared_files import share_index, share_input, share_log
from batch_app.webhook_targets import requested_webhook
from batch_app.webhooks import Webhook


class BatchUpload(Incoming[Batch]):
    """Under a key that was used before for the same form, becomes the batch that was made then.

    Raises also BadLines, ModelNotFound for a form's model that isn't in the registry, and
    IdempotencyMismatch.
    """

    def __init__(self, services: UploadServices, key: str | None = None) -> None:
        super().__init__(services)
        self._key = key
        self._fingerprint = FormFingerprint()
        self._batch_id = new_id("batch")
        self._file_id = new_id("file")
        self._model: ModelEntry | None = None
        self._intake: Intake | None = None
        #: The one that was made with the batch.
        self.webhook: Webhook | None = None

    @property
    def batch_id(self) -> str:
        """What the batch will be called, unless the key stands for an earlier one."""
        return self._batch_id

    def discard(self) -> None:
        if self._intake is not None:
            self._intake.close()
        super().discard()

    def _begin_file(self, fields: dict[str, str]) -> None:
        super()._begin_file(fields)
        if "model" in fields:
            with no_room_is_storage_full("receiving the upload"):
                rules = self._rules(self._require_model())
                self._intake = Intake(self._path, self._folder, rules, self.services.checker_places)
        self._wanted_webhook(fields)  # refused before the file is here, where that is possible

    def _take(self, piece: bytes) -> None:
        super()._take(piece)
        if self._key is not None:
            self._fingerprint.take(piece)
        if self._intake is not None:
            self._intake.grown(self._size_bytes)

    def _require_model(self) -> ModelEntry:
        if self._model is None:
            name = self._form.fields.get("model", "").strip()
            if not name:
                raise BadRequest(
                    'The form has no "model". GET /v1/models lists them.', param="model"
                )
            self._model = self.services.registry.get(name)
        return self._model

    def _may_deduplicate(self) -> bool:
        wish = self._form.fields.get("deduplicate", "true").strip().lower()
        if wish not in ("true", "false"):
            raise BadRequest('"deduplicate" must be true or false.', param="deduplicate")
        return wish == "true"

    def _wanted_webhook(self, fields: dict[str, str]) -> Webhook | None:
        url = fields.get("webhook_url", "").strip()
        if not url:
            return None
        return requested_webhook(
            self.services.settings,
            url,
            self.services.clock(),
            owner=self.services.caller.owner,
            secret=fields.get("webhook_secret", "").strip() or None,
            batch_id=self._batch_id,
            prefix="webhook_",
        )

    def _accept(self) -> Batch:
        idempotency = None
        if self._key is not None:
            said = self._fingerprint.with_fields(self._form.fields)
            idempotency = Idempotency(self._key, said)
            earlier = self.services.store.batch_of_key(idempotency, seen_by=self.services.caller)
            if earlier is not None:
                return earlier
        model = self._require_model()
        with tracing.span("intake", self._batch_id, model=model.name):
            summary = self._check_lines(model)
        return self._queue(model, summary, idempotency)

    def _rules(self, model: ModelEntry) -> IntakeRules:
        settings = self.services.settings
        return IntakeRules(
            registry=self.services.registry,
            model=model.name,
            endpoint=None,
            max_line_bytes=settings.max_line_bytes,
            max_requests=settings.max_requests_per_batch,
            max_errors=settings.max_line_errors,
            limits=BodyLimits.of(settings),
        )

    def _check_lines(self, model: ModelEntry) -> IntakeSummary:
        if self._intake is not None:
            return self._intake.finish()
        places = self.services.checker_places
        return index_file(self._path, self._folder, self._rules(model), places=places)

    def _queue(
        self, model: ModelEntry, summary: IntakeSummary, idempotency: Idempotency | None
    ) -> Batch:
        data, now = self.services.data, self.services.clock()
        input_file = StoredFile(
            id=self._file_id,
            purpose=FilePurpose.BATCH,
            filename=self._form.filename or "upload.jsonl",
            size_bytes=self._size_bytes,
            created_at=now,
            owner=self.services.caller.owner,
        )
        batch = Batch(
            id=self._batch_id,
            dialect=Dialect.NATIVE,
            status=BatchStatus.QUEUED,
            endpoint=summary.endpoints[0],
            model=model.name,
            input_file_id=input_file.id,
            created_at=now,
            queued_at=now,
            total=summary.num_requests,
            owner=self.services.caller.owner,
            deduplicate=self._may_deduplicate(),
        )
        webhook = self._wanted_webhook(self._form.fields)
        input_path, work_dir = data.input_file(input_file.id), data.work_dir(batch.id)
        self._leftovers += [input_path, work_dir, data.log_file(batch.id)]
        with no_room_is_storage_full("receiving the upload"):
            move_durably(self._path, input_path)
            sync_dir(self._folder)
            move_durably(self._folder, work_dir)
        crash_point("upload-moved")
        BatchLog(data.log_file(batch.id), clock=self.services.clock).write(
            f"submitted: {summary.num_requests} requests, {self._size_bytes} bytes, "
            f"model {model.name}"
        )
        share_input(data, input_file.id)
        share_index(data, batch.id)
        batch = replace(batch, workload=self.services.appraise(batch))
        created = self.services.store.add_batch(
            batch,
            input_file,
            idempotency,
            webhook=webhook,
            seen_by=self.services.caller,
            max_unfinished=self.services.settings.max_unfinished_batches,
        )
        crash_point("upload-added")
        if created.id != batch.id:
            return created  # the same form went through another server, at the same time
        self.webhook = webhook
        self._leftovers.clear()
        share_log(data, batch.id)
        with suppress(OSError):  # the batch is queued; a worker that isn't woken polls
            wake_workers(data)
        self.services.queued()
        return batch
