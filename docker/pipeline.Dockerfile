# The offline half: Ray, the teachers, olapipe. Built from the top of the repository:
#     docker build -f docker/pipeline.Dockerfile -t ola-distill-pipeline .
# pip's torch for Linux brings CUDA; the machine needs the driver and NVIDIA's container toolkit.
FROM python:3.11-slim

# make runs the same install as CI; wget is what KubeRay asks the health of a node with
RUN apt-get update && apt-get install --yes --no-install-recommends make wget && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 ola && mkdir /opt/ola /data && chown ola /opt/ola /data
USER ola
WORKDIR /opt/ola
COPY --chown=ola Makefile pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ola schemas schemas
COPY --chown=ola pipeline pipeline
RUN make install EXTRAS=pipeline,cluster,diffusion,buckets
ENV PATH=/opt/ola/.venv/bin:$PATH \
    RAY_USAGE_STATS_ENABLED=0 \
    RAY_AUTH_MODE=token \
    HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /data
ENTRYPOINT []
CMD ["olapipe", "--help"]
