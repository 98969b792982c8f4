"""What `vllm-batch doctor` and `vllm-batch models check` look at, each with what is wrong and the
fix. Looks only: no folder, table or setting is made, changed or brought up to date.

`examination.py` has all of it; `models.py` has the checks of one model, `engine.py` those of the
engine, `gpu.py` of the GPUs and of what loading on them needs, `storage.py` of data folder and
database, `service.py` of server and worker.
"""
