"""BEVFormer with DFA3D lifting."""
