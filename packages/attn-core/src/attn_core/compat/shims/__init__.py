"""What the shims consist of: names and signatures of the originals over attn_core's operators, one file a package."""
