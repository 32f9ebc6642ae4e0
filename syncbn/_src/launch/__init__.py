"""The launchers: links to the files of the repository's launch/, so that a wheel has them too."""
