"""Buckets of Open-Sora v2's image stage. Per rank, for 140 GB."""

# fmt: off
bucket_config = {
    "256px": {
        1: (1.0, 50),
    },
    "768px": {
        1: (0.5, 11),
    },
    "1024px": {
        1: (0.5, 7),
    },
}
