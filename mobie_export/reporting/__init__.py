"""How good is an export, and is anything wrong with it? An export beside what it was made from, as JSON and as a page.

    tally      what became of every tensor; every expert weight accounted for
    layers     both models layer by layer, in PyTorch
    scores     perplexity, divergence and tasks, by llama-perplexity
    speed      by llama-bench
    behaviour  what both answer, by llama-server
    findings   what of all that should not be so
    gather     all of it, as one JSON object
    page       that object as one HTML file; plots: its figures

A part that cannot be done here is `{"left_out": why}` in the JSON.
"""
