# The online half: torch and olatrain, without Ray and without any teacher. Built from the top of the repository:
#     docker build -f docker/trainer.Dockerfile -t ola-distill-trainer .
# pip's torch for Linux brings CUDA; the machine needs the driver and NVIDIA's container toolkit.
FROM python:3.11-slim

RUN apt-get update && apt-get install --yes --no-install-recommends make && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 ola && mkdir /opt/ola /data && chown ola /opt/ola /data
USER ola
WORKDIR /opt/ola
COPY --chown=ola Makefile pyproject.toml constraints.txt README.md LICENSE ./
COPY --chown=ola schemas schemas
COPY --chown=ola trainer trainer
RUN make install EXTRAS=trainer,buckets
ENV PATH=/opt/ola/.venv/bin:$PATH \
    HF_HUB_DISABLE_TELEMETRY=1
WORKDIR /data
ENTRYPOINT []
CMD ["olatrain", "--help"]
