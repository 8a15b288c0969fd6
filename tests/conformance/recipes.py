"""Recipes under which every method keeps the laws: a method is enrolled by a line here."""

from __future__ import annotations

from typing import Any

from tests.small import HALVES

WALK = {"type": "fedkseed", "size": 256, "steps": 6, "batch": 4, "lr": 1e-3}
PROJECT = {"train": {"optimizer": "sgd", "lr": 0.05, "steps": 2, "batch": 4}}
SPLIT = {"type": "sfprompt", "prompts": 3, "train": {"lr": 0.01, "steps": 2, "batch": 4, "accumulate": 2}}
EMULATED = {  # of two blocks, the first is trained and the second is rounded
    "type": "offsite",
    "first": 1,
    "last": 0,
    "keep": 1.0,
    "bits": 4,
    "train": {"lr": 0.01, "steps": 2, "batch": 4},
}
LOTTERY = {"type": "ltsft", "density": 0.1, "train": {"lr": 0.01, "steps": 2, "batch": 4}}
METHODS: dict[
    str, dict[str, Any]
] = {  # name of the method, a dash, the variant -> changes to the small recipe
    "fedpeft-lora": {},
    "fedpeft-kept-front": {"method__adapter": {"kind": "lora", "rank": 2, "last": 1, "keep_front": True}},
    "fedpeft-4bit": {"model__load": "4bit", "chain": [{"step": "quantize", "bits": 8}]},
    "fedpeft-bias": {"method__adapter": {"kind": "bias"}},
    "fedpeft-full": {"method__adapter": {"kind": "full"}},
    "fedpeft-outer": {"method__server": {"optimizer": "sgd", "lr": 0.7, "momentum": 0.9, "nesterov": True}},
    "fedpeft-adam": {"method__server": {"optimizer": "adam", "lr": 0.01, "amsgrad": True}},
    "fedpeft-chain": {"chain": [{"step": "ternary", "keep": 0.2, "error_feedback": True}]},
    "fedpeft-both-ways": {
        "chain": [{"step": "sign", "error_feedback": True}],
        "downlink": {"step": "delta"},
        "sampling": {"count": 3},
    },
    "fedpeft-sparse-both-ways": {
        "chain": [{"step": "topk", "keep": 0.05, "bits": 2, "chunk": 512, "decay": 0.95}],
        "downlink": {"step": "delta", "keep": 0.05, "width": 2, "chunk": 512, "start": "int8"},
        "sampling": {"count": 3},
    },
    "fedpeft-sign-unbiased": {
        "chain": [{"step": "sign", "scale": "unbiased", "error_feedback": False}],
        "downlink": {"step": "delta", "keep": 1.0, "width": 4},
        "sampling": {"count": 3},
    },
    "fedpeft-ffa": {"aggregate": {"rule": "ffa"}},
    "fedpeft-lora-fa": {
        "aggregate": {"rule": "ffa"},
        "method__adapter": {"kind": "lora", "rank": 2, "projected": True, "lr_ratio": 4.0},
    },
    "fedpeft-rolora": {"aggregate": {"rule": "rolora"}},
    "fedpeft-hft": {"aggregate": {"rule": "hft"}, "method__adapter": {"kind": "full"}},
    "fedpeft-lift": {
        "method__adapter": {"kind": "lift", "rank": 2, "filter_rank": 4},
        "chain": [{"step": "ring", "clip": 0.5, "weight": 64}, {"step": "mask"}],
    },
    "fedpeft-lift-stages": {
        "method__adapter": {"kind": "lift", "rank": 2, "filter_rank": 4, "stages": 2, "refresh": 2},
        "chain": [{"step": "ternary", "keep": 0.2, "error_feedback": True}],
        "sampling": {"count": 3},
    },
    "fedpeft-eva": {"method__lora_start": "eva"},
    "fedpeft-corda": {"method__lora_start": "corda", "chain": [{"step": "quantize", "bits": 8}]},
    "fedpeft-pissa": {
        "method__lora_start": "pissa",
        "method__server": {"optimizer": "sgd", "lr": 0.7, "momentum": 0.9},
    },
    "fedpeft-fedsa": {"aggregate": {"rule": "fedsa"}},
    "fedpeft-flexlora": {"aggregate": {"rule": "flexlora"}, "method__lora_rank_by_client": [1, 2, 3]},
    "fedpeft-hetlora": {
        "aggregate": {"rule": "hetlora"},
        "method__lora_rank_by_client": [1, 2],
        "method__lora_alpha_by_client": [4.0, 2.0],
    },
    "fedpeft-flora": {"aggregate": {"rule": "flora", "extra": 4}, "method__lora_rank_by_client": [1, 2]},
    "fedpeft-fedex": {"aggregate": {"rule": "fedex", "extra": 4}},
    "fedpeft-fair": {"aggregate": {"rule": "fair"}, "chain": [{"step": "quantize", "bits": 8}]},
    "fedpeft-fedsb": {"aggregate": {"rule": "fedsb"}},
    "fedpeft-fedrot": {"aggregate": {"rule": "fedrot"}},
    "experts-given": {
        "method__type": "experts",
        "method__experts": HALVES,
    },
    "experts-clusters": {
        "method__type": "experts",
        "method__experts": {
            "by": "clusters",
            "warm_up": 1,
            "min_clients": 2,
            "sketch": 64,
            "recluster_every": 1,
        },
        "chain": [{"step": "ternary", "keep": 0.2, "error_feedback": True}],
        "partition": {"by": "shards", "shards_per_client": 1, "clients": 6},
    },
    "experts-clients": {
        "method__type": "experts",
        "method__experts": {"by": "clients", "warm_up": 2},
        "aggregate": {"rule": "ffa"},
        "sampling": {"count": 3},
    },
    "experts-rolora": {
        "method__type": "experts",
        "method__experts": {"by": "given", "groups": ["a", "a", "b", ""], "warm_up": 1, "min_clients": 2},
        "aggregate": {"rule": "rolora"},
    },
    "experts-auto": {
        "method__type": "experts",
        "method__experts": {
            "by": "given",
            "groups": ["a", "a", "b", "b", "b", "b"],
            "warm_up": 1,
            "min_clients": 2,
            "rank": "auto",
        },
        "method__adapter": {"kind": "lora", "rank": 16},
        "method__train": {"lr": 0.02, "steps": 6, "batch": 4},
        "partition": {"by": "shards", "shards_per_client": 1, "clients": 6},
    },
    "experts-gate": {
        "method__type": "experts",
        "method__experts": {
            "by": "clusters",
            "warm_up": 1,
            "min_clients": 2,
            "sketch": 64,
            "most": 4,
            "gate": {"rounds": 1, "null": True, "balance": 0.01},
        },
        "chain": [{"step": "quantize", "bits": 8}],
        "partition": {"by": "shards", "shards_per_client": 1, "clients": 6},
    },
    "experts-gate-mask": {
        "method__type": "experts",
        "method__experts": {
            "by": "given",
            "groups": ["a", "a", "b", "b", "a", "b"],
            "warm_up": 1,
            "gate": {"rounds": 1, "localized": 0.1},
        },
        "partition": {"by": "iid", "clients": 6},
        "chain": [{"step": "ring", "clip": 0.5, "weight": 64}, {"step": "mask"}],
    },
    "experts-gate-sums": {
        "method__type": "experts",
        "method__experts": {
            "by": "given",
            "groups": ["a", "a", "b", "b", "a", "b", "", "", ""],
            "warm_up": 1,
            "gate": {"fit": "sums", "width": 48},
        },
        "partition": {"by": "iid", "clients": 9},
        "chain": [{"step": "ring", "clip": 0.5, "weight": 64}, {"step": "mask"}],
    },
    "experts-shape": {
        "method__type": "experts",
        "method__experts": {
            "by": "given",
            "groups": ["a", "b", "c", "d"],
            "warm_up": 1,
            "min_clients": 2,
            "shape": "inverted",
            "gate": {"rounds": 1, "localized": 0.1},
        },
        "partition": {"by": "iid", "clients": 8},
    },
    "experts-mixlora": {
        "method__type": "experts",
        "method__experts": {
            **HALVES,
            "preset": "mixlora",
            "gate": {"rounds": 1, "null": True},
        },
        "chain": [{"step": "quantize", "bits": 8}],
    },
    "fedkseed-steps": {"method": {**WALK, "estimator": "spsa"}},
    "fedkseed-pro": {"method": {**WALK, "estimator": "spsa", "importance": True}},
    "fedkseed-pool": {
        "method": {**WALK, "estimator": "spsa", "uplink": "pool", "pool": "independent", "refresh": 2}
    },
    "fedkseed-fzoo": {"method": {**WALK, "estimator": "fzoo", "group": 3}, "sampling": {"count": 3}},
    "fedkseed-table": {
        "method": {**WALK, "estimator": "spsa", "walk": "table"},
        "model__dtype": "bfloat16",
        "sampling": {"count": 3},
    },
    "fedkseed-curved": {
        "method": {**WALK, "estimator": "spsa", "uplink": "pool", "refresh": 1, "curvature": True}
    },
    "fedkseed-mixed": {"method": {**WALK, **PROJECT, "estimators": ["spsa", "gradient"], "space": "adapter"}},
    "sfprompt-slim": {"method": {**SPLIT, "head": 0, "slim": "auto"}},
    "sfprompt-paper": {
        "method": {**SPLIT, "preset": "sfprompt-paper", "cache_smashed": True, "codec": "int8"},
        "chain": [{"step": "quantize", "bits": 8}],
    },
    "sfprompt-lora": {"method": {**SPLIT, "lora_rank": 2}},
    "fedpeft-means": {"method__head_start": "means", "chain": [{"step": "quantize", "bits": 8}]},
    "fedpeft-ridge": {
        "method__head_start": "ridge",
        "aggregate": {"rule": "fedsa"},
        "method__server": {"optimizer": "none"},
    },
    "fedpeft-lda": {"method__head_start": "lda", "chain": [{"step": "quantize", "bits": 8}]},
    "fedkseed-lda": {"method": {**WALK, "lr": 1e-6, "estimator": "spsa", "head_start": "lda"}},
    "sfprompt-lda": {"method": {**SPLIT, "head_start": "lda"}},
    "fedkseed-means": {
        "method": {
            **WALK,
            **PROJECT,
            "lr": 1e-6,
            "gain": 0.1,
            "estimators": ["spsa", "gradient"],
            "guard": 0.0,
            "head_start": "means",
        }
    },
    "fedkseed-ridge": {"method": {**WALK, "lr": 1e-6, "estimator": "spsa", "head_start": "ridge"}},
    "sfprompt-means": {"method": {**SPLIT, "head_start": "means"}, "model__pooling": "mean"},
    "fedpeft-speed": {"method__weight": "loss-speed", "sampling": {"count": 3}},
    "fedpeft-group": {"select": [{"by": "group", "evenness": 0.5}], "data__group": "site"},
    "fedpeft-mask": {"method__head_start": "lda", "chain": [{"step": "mask"}]},
    "experts-mask": {
        "method__type": "experts",
        "method__experts": {"by": "given", "groups": ["a", "a", "b", "b", "a", "b"], "warm_up": 1},
        "partition": {"by": "iid", "clients": 6},
        "chain": [{"step": "ring", "clip": 0.5, "weight": 64}, {"step": "mask"}],
    },
    "fedkseed-mask": {
        "method": {**WALK, **PROJECT, "estimators": ["spsa", "gradient"], "uplink": "pool"},
        "chain": [{"step": "mask", "threshold": 0.75}],
    },
    "sfprompt-mask": {"method": {**SPLIT, "head_start": "means"}, "chain": [{"step": "mask"}]},
    "offsite-lora": {"method": {**EMULATED, "adapter": {"kind": "lora", "rank": 2}}},
    "offsite-coded": {
        "method": {**EMULATED, "adapter": {"kind": "full"}, "head_start": "lda"},
        "chain": [{"step": "ternary", "keep": 0.2, "error_feedback": True}],
        "downlink": {"step": "delta"},
        "sampling": {"count": 3},
    },
    "offsite-median": {
        "method": {**EMULATED, "adapter": {"kind": "lora", "rank": 2}},
        "aggregate": {"rule": "median"},
    },
    "ltsft-union": {"method": LOTTERY, "sampling": {"count": 3}},
    "ltsft-threshold": {
        "method": {**LOTTERY, "elect": "threshold", "vote_steps": 3, "head_start": "lda"},
        "chain": [{"step": "ternary", "keep": 0.2, "error_feedback": True}],
    },
    "ltsft-mask": {"method": LOTTERY, "chain": [{"step": "mask"}]},
    "sfprompt-tail": {
        "method": {**SPLIT, "head": 0, "tail": 1, "position": "input", "pruning": "random", "keep": 0.5}
    },
}
