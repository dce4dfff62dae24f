"""The science of DDPO: advantages, objectives, the update."""
