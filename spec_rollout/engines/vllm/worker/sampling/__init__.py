"""The ways in which a step is sampled, one file each, behind one interface (`base.Path`)."""
