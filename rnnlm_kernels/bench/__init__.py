"""The benchmark: problems, contenders, interleaved timing, results and their report.

Read in this order: ``workload`` (what is run), ``grids`` (which ones), ``contenders`` (by whom;
``onnx_runtime`` is one of them), ``measure`` (how a number is obtained), ``roofline`` (how good it
could be), ``harness`` (the loop), ``results`` (what is written),
``targets`` (what was promised), ``report`` and ``plot`` (what a reader sees). ``tune`` times the
ways of running a layer against each other.

The command line is ``rnnlm-kernels bench``; from Python::

    from rnnlm_kernels.bench import grids, harness
    results = harness.run(grids.default_grid())
    results.save("results.json")
"""
