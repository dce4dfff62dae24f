"""Does reinforcement learning bring an erased concept back? Steps and reward queries until it is.

    python -m benchmarks.erased_revived MODEL [--concept red] [--out runs/revived] [--seeds 1] [--steps 60] [--sd15 DIR]
"""
def sd15_shape() -> dict[str, object]:
    """The configuration of Stable Diffusion 1.5's UNet."""
    return {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
        "layers_per_block": 2,
    }
