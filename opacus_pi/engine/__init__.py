"""The parts of ``PrivacyEngine``: what it watches, records, refuses and resumes."""
