//! Generates the protobuf types and the gRPC client and server.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    tonic_prost_build::configure().compile_protos(
        &["proto/opencluster/control/v1/control.proto", "proto/opencluster/local/v1/local.proto"],
        &["proto"],
    )?;
    Ok(())
}
