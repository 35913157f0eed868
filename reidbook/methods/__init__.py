"One module a method; each names its `Method` class `METHOD`."
