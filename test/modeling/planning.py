"""How tests let a network plan: on the first moment of a batch."""

import torch


def plan(driver, batch, num_steps=2, **options):
    """Return the plan from no noise, or from that of the options."""
    length = int(batch.prompt_lengths[0])
    return driver.eval().plan(
        batch.patches[0],
        batch.input_ids[0, :length],
        batch.position_ids[:, 0, :length],
        batch.proprio[0],
        options.pop('noise', torch.zeros_like(batch.action[0])),
        num_steps=num_steps,
        **options,
    )
