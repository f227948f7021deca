//! How the API's description shows a rule.

use serde_json::json;
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};

use super::{AllowEntry, EgressRule};

impl utoipa::PartialSchema for EgressRule {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some(
                "A destination that the guest may reach: TARGET[:PORTS][/udp]. TARGET is a domain name, *.NAME (all names \
                 below it), an IPv4 address or network, an IPv6 one in brackets, or host (the host's loopback). PORTS is a \
                 list of ports and ranges, or *; without it 80 and 443.",
            ))
            .examples([json!("example.com:443")])
            .into()
    }
}

impl utoipa::ToSchema for EgressRule {}

impl utoipa::PartialSchema for AllowEntry {
    fn schema() -> RefOr<Schema> {
        ObjectBuilder::new()
            .schema_type(Type::String)
            .description(Some(
                "A rule (see EgressRule), or a preset: @NAME, which stands for the rules that it has now.",
            ))
            .examples([json!("@pip")])
            .into()
    }
}

impl utoipa::ToSchema for AllowEntry {}
