"""`python -m recipes.tiny`."""

from .recipe import main

raise SystemExit(main())
