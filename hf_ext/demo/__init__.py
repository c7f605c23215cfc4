"""The main job, end to end on a real language model: `hf-ext demo`."""
