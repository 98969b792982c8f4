"""What `vllm-batch doctor` and `vllm-batch models check` look at, each with what is wrong and the
fix. Looks only: nothing is made, changed or brought up to date.

`models.py` has the checks of one model, `engine.py` those of the engine and the device,
`storage.py` of data folder and database, `service.py` of server and worker.
"""
