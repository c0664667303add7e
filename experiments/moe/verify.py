"""Verifies a folding for a model on virtual CPU devices, before a cluster is paid for.

    python -m experiments.moe.verify --folding="attention=tp2.cp2.dp2 experts=ep8" --model=mixtral-8x22b --shrink

Loss, gradients and optimizer steps against one device, token conservation, all dispatchers, and the collectives of the
compiled program against the declared groups. The exit code is 0 if everything passed.
"""

import sys

from absl import flags

from experiments.common.flags import read_flags
from experiments.common.launch import virtual_devices

FLAGS = flags.FlagValues()
flags.DEFINE_string("folding", "attention=tp2.dp4 experts=ep8", "the folding to verify", flag_values=FLAGS)
flags.DEFINE_string("model", "mixtral-8x7b", "a published shape, see jaxrl_suite.lm.named_config", flag_values=FLAGS)
flags.DEFINE_bool("shrink", False, "keep the conventions of the model but make it small", flag_values=FLAGS)
flags.DEFINE_integer("num_steps", 10, "optimizer steps of the trajectory check", flag_values=FLAGS)
flags.DEFINE_integer("num_microbatches", 0, "micro-batches of a step; 0 for the number of stages", flag_values=FLAGS)
flags.DEFINE_enum("schedule", "gpipe", ["gpipe", "1f1b"], "pipeline schedule", flag_values=FLAGS)
flags.DEFINE_enum("context", "all_gather", ["all_gather", "ring"], "context kernel", flag_values=FLAGS)
flags.DEFINE_enum("sharding", "none", ["none", "zero1", "fsdp"], "what data ranks split", flag_values=FLAGS)


def main(arguments: list[str]) -> int:
    """Prints the rank map and the report."""
    done = read_flags(FLAGS, arguments, __doc__ or "")
    if done is not None:
        return done
    from jaxrl_suite.moe.folding import Folding

    try:
        folding = Folding.parse(FLAGS.folding)
        virtual_devices(folding.num_ranks)
        from jaxrl_suite import lm, moe
        from jaxrl_suite.moe.verify import shrink, verify

        model = lm.named_config(FLAGS.model)
        config = moe.MoEConfig(
            model=shrink(model, folding) if FLAGS.shrink else model.replace(param_dtype="float32"),
            num_microbatches=FLAGS.num_microbatches or folding.pp,
            schedule=FLAGS.schedule,
            context=FLAGS.context,
            sharding=FLAGS.sharding,
            block_rows=16 if FLAGS.shrink else 128,
        )
        print(folding.describe())
        report = verify(config, folding, num_steps=FLAGS.num_steps)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{report}")
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
