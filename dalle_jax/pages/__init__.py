"""What a person looks at: HTML pages, charts and contact sheets, one file for each kind of page."""
