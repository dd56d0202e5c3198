"""Model servers, behind one interface (`base.Backend`)."""
