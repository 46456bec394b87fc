"""A method at work in a Hugging Face model: hooking, what a layer sees, adapters to the families, second streams."""
