"""LoRA experts: who shares one, how they are named and kept, and what routes between them."""
