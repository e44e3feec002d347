"""`make plan` and `make dryrun`: memory and time of a recipe before it is started, and faster configurations.

Pure Python and numpy: without PyTorch and Megatron-Core (only dryrun.py takes them), a plan takes a second on a laptop.

    models.py     configs of published models, for hub ids without a local folder
    hardware.py   GPUs: memory, rates, links, and the published run that calibrates each rate
    inputs.py     the input of a plan
    workload.py   pairs (from files, or assumed) -> the packs that the training's sampler makes
    memory.py     bytes of a rank, by part
    kernels.py    seconds of kernels and collectives on a rank
    time.py       seconds of the job, by part
    estimate.py   memory and time of one recipe
    search.py     the cheapest changes that fit; the fastest configurations
    text.py       an estimate as text and JSON           figure.py   as an HTML page
    dryrun.py     every rank of a job, built without weights
"""
