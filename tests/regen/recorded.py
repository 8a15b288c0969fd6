"""What is recorded in simulations/results: each table's title, and the command that makes it."""

from __future__ import annotations

ABOUT = {
    "demo": ("The built-in federation", "fedtune simulate"),
    "shakespeare": (
        "Tinyshakespeare by speaker: pooled test perplexity (lower is better)",
        "python simulations/record.py shakespeare --set model.name=FOLDER/stories260K-fp32 --set "
        "data.path=FOLDER/input.txt",
    ),
    "shakespeare-codes": (
        "The message chain on tinyshakespeare: perplexity against bits a parameter",
        "python simulations/record.py shakespeare-codes --set model.name=... --set data.path=...",
    ),
    "shakespeare-bits": (
        "Bits against loss on tinyshakespeare, up and down, ten rounds of ten steps with the best outer step",
        "python simulations/record.py shakespeare-bits --set model.name=... --set data.path=...",
    ),
    "shakespeare-bits-long": (
        "The same, sixty rounds of thirty steps",
        "python simulations/record.py shakespeare-bits-long --set model.name=... --set data.path=...",
    ),
    "shakespeare-rules": (
        "Rules of [aggregate] on tinyshakespeare: perplexity",
        "python simulations/record.py shakespeare-rules --set model.name=... --set data.path=...",
    ),
    "shakespeare-starts": (
        "Starts of LoRA's factors on tinyshakespeare: perplexity of rows that four clients hold out, "
        "rounds of three steps of 8 x 64 tokens at a constant rate, the best of two or three on seed 11",
        "python simulations/record.py shakespeare-starts --set model.name=... --set data.path=...",
    ),
    "preference": (
        "Preference tuning of a model of 260,032 parameters on pairs of docstrings: share of held-out pairs in "
        "their order",
        "python simulations/record.py preference --set model.name=FOLDER/stories260K-fp32",
    ),
    "clinc150-labels": (
        "Losses where clients' labels are skewed: CLINC150, Dirichlet(0.1) over 150 intents, ten clients, "
        "20 rows an intent, four rounds of 20 steps of 8, LoRA in the last block",
        "python simulations/record.py clinc150-labels --set data.path=FOLDER",
    ),
    "clinc150-ranks": (
        "Clients of ranks 4, 8 and 16 on CLINC150, a domain of intents each, 30 local steps",
        "python simulations/record.py clinc150-ranks --set data.path=FOLDER",
    ),
    "clinc150-kinds-domains": (
        "FedPEFT's table in miniature: CLINC150, ten domains are ten clients, accuracy on all 150 intents",
        "python simulations/record.py clinc150-kinds-domains --set data.path=FOLDER",
    ),
    "clinc150-kinds-dirichlet": (
        "The same with Dirichlet(0.1) over domains",
        "python simulations/record.py clinc150-kinds-dirichlet --set data.path=FOLDER",
    ),
    "fedkseed-clinc150": (
        "FedKSeed and FedPEFT on the ten domains of CLINC150, 2,000 rows at four sites, accuracy (the "
        "largest class has a tenth of the rows)",
        "python simulations/record.py fedkseed-clinc150 --set data.path=FOLDER",
    ),
    "clinc150-codes": (
        "The message chain on CLINC150, Dirichlet(0.1) over domains, LoRA",
        "python simulations/record.py clinc150-codes --set data.path=FOLDER",
    ),
}


SMALL: dict[
    str, tuple[str, str, dict[str, str]]
] = {  # tables of scripts of their own: title, command, column -> heading
    "byzantine": (
        "Two of ten clients lie: their move ten times, backwards (tinyshakespeare, six rounds)",
        "python simulations/byzantine.py --set model.name=... --set data.path=...",
        {"loss": "test loss, nats", "share": "share of what the mean gains where nobody lies"},
    ),
    "privacy": (
        "Differential privacy of rows at five sites, delta 1e-5: CLINC150, accuracy on 150 intents",
        "python simulations/privacy.py --set data.path=FOLDER --what means head",
        {"accuracy": "accuracy"},
    ),
    "privacy-attack": (
        "Ten rows of a class, learnt by heart: what membership attacks find in the head (area under their curve; 0.5 "
        "is chance)",
        "python simulations/privacy.py --set data.path=FOLDER --what few",
        {"accuracy": "accuracy", "auc_loss": "by the loss", "auc": "beside a shadow model"},
    ),
    "preference-trl": (
        "DPO by fedtune and by TRL's own trainer behind fedtune.patch: four clients, twelve pairs each, all in every "
        "step, three rounds of four steps; losses of training in nats",
        "python simulations/preference_trl.py --set model.name=FOLDER/stories260K-fp32",
        {
            "first": "first round",
            "last": "last round",
            "loss": "loss of 60 other pairs",
            "accuracy": "of them in their order",
            "cpu_seconds": "CPU seconds of the rounds",
        },
    ),
    "merging": (
        "Six experts that never met become one adapter: pooled test perplexity; one random start for all, a "
        "base that never saw a play",
        "python simulations/merging.py --set model.name=... --set data.path=...",
        {"": "perplexity"},
    ),
    "merging-strangers": (
        "The same as strangers: a random start of its own for each, and a base that was first tuned on six "
        "other speakers",
        "python simulations/merging.py --case strangers --set model.name=... --set data.path=...",
        {"": "perplexity"},
    ),
    "tuning-gsm8k": (
        "SmolLM2-135M-Instruct on GSM8K, four clients with 16 rows each, three rounds of four steps of 2, LoRA in "
        "the last 8 of 30 blocks",
        "python simulations/tuning.py gsm8k --data FOLDER --general natural_instructions/test.jsonl",
        {"loss": "held-out loss, nats", "forgetting": "rise of the loss on Natural Instructions"},
    ),
    "sfprompt-digits": (
        "Split learning: a small vision transformer that knows the digits 0 to 4 learns 5 to 9 at eight "
        "clients",
        "python simulations/sfprompt.py FOLDER",
        {
            "accuracy": "accuracy, mean of rounds 16 to 20",
            "cut_bytes": "bytes over the cut, a client and round",
            "message_bytes": "bytes of messages",
        },
    ),
    "sfprompt-clinc150": (
        "Split learning on text: CLINC150, ten domains are ten clients, ten rounds of six steps of 8; "
        "learning rates tuned on seed 11",
        "python simulations/sfprompt.py FOLDER --text",
        {
            "accuracy": "accuracy on all 150 intents",
            "cut_bytes": "bytes over the cut, a client and round",
            "message_bytes": "bytes of messages",
            "client_flops": "a client's FLOPs, of full fine-tuning's",
            "client_memory_bytes": "a client's memory in bytes, by formula",
        },
    ),
}
