"""The science of self-consuming loops: data rules, exact laws, verdicts."""
