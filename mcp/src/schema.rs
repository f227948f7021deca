//! Schemas of arguments and results, made of the core's own types. Pure.
//!
//! The types' own descriptions are for OpenAPI. Agents want them differently: nothing to look up elsewhere, times in seconds, and
//! optional arguments that are simply not required: some clients refuse `["string", "null"]`, most models a schema that has
//! alternatives at its root, and some converters a boolean `additionalProperties` or a `$ref`. A model pays for every byte of
//! `tools/list`: the schema of a result names its fields and their types, and that of arguments is listed without its bounds.
//!
//! Invariants: arguments and results are objects; arguments have no boolean `additionalProperties` (`argument_reader.rs` ignores
//! what they do not have).

use serde_json::{Map, Value, json};
use utoipa::ToSchema;
use utoipa::openapi::{RefOr, Schema};

/// Words of OpenAPI that JSON Schema has no use for.
const OMITTED_KEYWORDS: [&str; 2] = ["example", "discriminator"];
/// The key of an argument's schema under which a shorter one is, which clients get instead.
pub const LISTED_AS: &str = "x-listed-as";
/// What references begin with.
const SCHEMA_PREFIX: &str = "#/components/schemas/";

/// The schema of a tool's arguments.
#[must_use]
pub fn arguments<T: ToSchema>() -> Value {
    let mut schema = whole::<T>();
    without_null(&mut schema);
    open(&mut schema);
    described_in_place(&mut schema);
    in_seconds(&mut schema);
    schema
}

/// An argument schema as clients get it: without the arguments in `unlisted`, and without the bounds and patterns that the argument
/// reader checks. A model pays for every byte.
#[must_use]
pub fn listed(mut schema: Value, unlisted: &[&str]) -> Value {
    if let Some(properties) = schema["properties"].as_object_mut() {
        properties.retain(|name, _| !unlisted.contains(&name.as_str()));
        for field in properties.values_mut() {
            if let Some(short) = field.get_mut(LISTED_AS) {
                *field = short.take();
            }
        }
    }
    if schema["required"].as_array().is_some_and(Vec::is_empty) {
        schema.as_object_mut().map(|fields| fields.remove("required"));
    }
    without_bounds(&mut schema);
    schema
}

fn without_bounds(schema: &mut Value) {
    if let Value::Object(fields) = schema {
        fields.retain(|key, value| match key.as_str() {
            "pattern" => !value.is_string(),
            "minimum" | "exclusiveMinimum" | "maximum" | "minItems" | "maxItems" => !value.is_number(),
            // Of a type, which the argument's name implies.
            "description" => !value.as_str().is_some_and(|words| {
                words.starts_with("The name of a ") || ["The state of a VM.", "A log of a VM."].contains(&words)
            }),
            // Nothing that has to be known in order to leave it out.
            "default" => !(*value == json!(false) || *value == json!({})),
            _ => true,
        });
    }
    each(schema, without_bounds);
}

/// The schema of a tool's result: its fields with their types. An error is text, and data that no schema has to name.
#[must_use]
pub fn result<T: ToSchema>() -> Value {
    fields_of(&whole::<T>(), &[])
}

/// The same of a tool that may take longer than a client waits: or a job.
#[must_use]
pub fn result_or_job<T: ToSchema>() -> Value {
    fields_of(&whole::<T>(), &["job_id"])
}

/// The result of a tool that changes a VM: the VM, or a job.
#[must_use]
pub fn vm_or_job() -> Value {
    fields_of(&whole::<VmFields>(), &["job_id"])
}

/// The fields of a VM that programs need; `vm_info` lists all.
#[derive(utoipa::ToSchema)]
#[expect(dead_code, reason = "only its schema is used")]
struct VmFields {
    name: String,
    id: String,
    status: String,
    ip_address: Option<String>,
    ssh_command: Option<String>,
    lease: Option<String>,
    expires_at: Option<String>,
}

/// The fields of an object with their types, without what they hold; `more` are texts. None is required: which of them there are
/// depends on how the call ended.
fn fields_of(schema: &Value, more: &[&str]) -> Value {
    let fields = schema["properties"].as_object().into_iter().flatten();
    let mut fields: Map<String, Value> = fields.map(|(name, field)| (name.clone(), type_of(field))).collect();
    for name in more {
        fields.entry((*name).to_owned()).or_insert_with(|| json!({ "type": "string" }));
    }
    json!({ "type": "object", "properties": fields })
}

/// The type of a field: one, because a field without a value is left out.
fn type_of(field: &Value) -> Value {
    let kind_of = |kind: &Value| match kind.as_str() {
        Some("array") => json!({ "type": "array", "items": items_of(field) }),
        _ => json!({ "type": kind }),
    };
    let choices = field["oneOf"].as_array().or_else(|| field["anyOf"].as_array());
    let mut kinds: Vec<Value> = match (&field["type"], choices) {
        (Value::Array(kinds), _) => kinds.clone(),
        (Value::Null, Some(choices)) => choices.iter().map(|choice| choice["type"].clone()).collect(),
        (kind, _) => vec![kind.clone()],
    };
    kinds.retain(|kind| kind != "null");
    match kinds.as_slice() {
        [only] if only.is_string() => kind_of(only),
        _ => json!({}),
    }
}

fn items_of(field: &Value) -> Value {
    match &field["items"]["type"] {
        Value::String(kind) => json!({ "type": kind }),
        _ => json!({}),
    }
}

/// Sets the descriptions of arguments; an empty one means that the name is enough.
#[must_use]
pub fn described(mut schema: Value, words: &[(&str, &str)]) -> Value {
    for (name, description) in words {
        let field = &mut schema["properties"][name];
        field["description"] = json!(description);
        if description.is_empty() {
            described_in_place(field);
        }
    }
    schema
}

/// The same arguments as another tool's, which describes them.
#[must_use]
pub fn undescribed(mut schema: Value) -> Value {
    for field in schema["properties"].as_object_mut().into_iter().flat_map(Map::values_mut) {
        described_in_place(field);
        field.as_object_mut().map(|field| field.remove("default"));
        if let Some(short) = field.get_mut(LISTED_AS) {
            described_in_place(short);
        }
    }
    schema
}

/// The schema of a type, with everything it refers to in place.
#[must_use]
pub fn whole<T: ToSchema>() -> Value {
    let mut parts: Vec<(String, RefOr<Schema>)> = Vec::new();
    T::schemas(&mut parts);
    let parts: Map<String, Value> = parts.into_iter().map(|(name, schema)| (name, json(&schema))).collect();
    let mut schema = json(&T::schema());
    resolve(&mut schema, &parts, 0);
    schema
}

fn json(schema: &RefOr<Schema>) -> Value {
    serde_json::to_value(schema).unwrap_or_default()
}

/// Puts what is referred to in the place of the reference, and what is composed into one object.
fn resolve(schema: &mut Value, parts: &Map<String, Value>, depth: usize) {
    // Types of the core do not hold themselves; if one ever does, that must not be the end.
    if depth > 32 {
        return;
    }
    if let Some(name) = schema.get("$ref").and_then(Value::as_str).and_then(|path| path.strip_prefix(SCHEMA_PREFIX)) {
        let mut part = parts.get(name).cloned().unwrap_or_else(|| json!({}));
        // The field's description is more specific than its type's.
        if let (Some(own), Some(part)) = (schema.as_object(), part.as_object_mut()) {
            part.extend(own.iter().filter(|(key, _)| *key != "$ref").map(|(key, value)| (key.clone(), value.clone())));
        }
        *schema = part;
    }
    match schema {
        Value::Object(fields) => {
            fields.retain(|key, value| {
                let said_twice = key == "propertyNames" && *value == json!({ "type": "string" });
                !OMITTED_KEYWORDS.contains(&key.as_str()) && !said_twice
            });
            plain_number(fields);
            fields.values_mut().for_each(|value| resolve(value, parts, depth + 1));
            merge(fields);
        }
        Value::Array(items) => items.iter_mut().for_each(|item| resolve(item, parts, depth + 1)),
        _ => {}
    }
}

/// The formats of numbers are OpenAPI's own.
fn plain_number(fields: &mut Map<String, Value>) {
    let Some(format) = fields.get("format").and_then(Value::as_str) else { return };
    if format.contains("int") || matches!(format, "double" | "float") {
        if format.starts_with('u') {
            fields.entry("minimum").or_insert_with(|| json!(0));
        }
        fields.remove("format");
    }
}

/// `allOf` objects as the one object that they are together.
fn merge(fields: &mut Map<String, Value>) {
    let Some(Value::Array(parts)) = fields.remove("allOf") else { return };
    let (mut properties, mut required) = (Map::new(), Vec::new());
    for part in parts {
        let Value::Object(mut part) = part else { continue };
        if let Some(Value::Object(some)) = part.remove("properties") {
            properties.extend(some);
        }
        if let Some(Value::Array(some)) = part.remove("required") {
            required.extend(some);
        }
    }
    fields.insert("type".into(), json!("object"));
    fields.insert("required".into(), required.into());
    fields.insert("properties".into(), properties.into());
}

/// Takes `null` out of what may be given: what is not given is left out.
fn without_null(schema: &mut Value) {
    if let Value::Object(fields) = schema {
        if fields.get("default").is_some_and(Value::is_null) {
            fields.remove("default");
        }
        if let Some(Value::Array(kinds)) = fields.get_mut("type") {
            kinds.retain(|kind| kind != "null");
            if let [only] = kinds.as_slice() {
                let only = only.clone();
                fields.insert("type".into(), only);
            }
        }
        if let Some(Value::Array(choices)) = fields.get_mut("oneOf") {
            choices.retain(|choice| choice["type"] != "null");
            if choices.len() == 1
                && let Some(Value::Object(only)) = choices.pop()
            {
                fields.remove("oneOf");
                for (key, value) in only {
                    fields.entry(key).or_insert(value);
                }
            }
        }
    }
    each(schema, without_null);
}

/// What an object does not list is ignored and named, which the schema does not express.
fn open(schema: &mut Value) {
    if let Value::Object(fields) = schema
        && fields.get("additionalProperties").is_some_and(Value::is_boolean)
    {
        fields.remove("additionalProperties");
    }
    each(schema, open);
}

/// Times in seconds, as the specification has them: `timeout_ms` is `timeout_seconds`, and a fraction is allowed. Only at the root:
/// no argument holds a time any deeper.
fn in_seconds(schema: &mut Value) {
    let Some(Value::Object(fields)) = schema.get_mut("properties") else { return };
    let known: Vec<String> = fields.keys().cloned().collect();
    let renamed = std::mem::take(fields).into_iter().filter_map(|(name, mut field)| {
        let Some(stem) = name.strip_suffix("_ms") else { return Some((name, field)) };
        let name = format!("{stem}_seconds");
        if known.contains(&name) {
            return None;
        }
        // Nothing but whole milliseconds greater than nothing: any time greater than nothing.
        let bound = match field["minimum"].as_u64() {
            Some(1..) => "exclusiveMinimum",
            _ => "minimum",
        };
        let mut described = json!({ "type": "number", bound: 0 });
        if let Some(ms) = field["maximum"].as_u64() {
            described["maximum"] = (ms / 1000).into();
        }
        if let Some(words) = field["description"].as_str() {
            described["description"] = words.replace("milliseconds", "seconds").into();
        }
        field = described;
        Some((name, field))
    });
    let renamed: Map<String, Value> = renamed.collect();
    *fields = renamed;
}

/// The type's own description is for programmers.
fn described_in_place(schema: &mut Value) {
    if let Value::Object(fields) = schema {
        fields.remove("description");
    }
}

fn each(schema: &mut Value, change: fn(&mut Value)) {
    match schema {
        Value::Object(fields) => fields.values_mut().for_each(change),
        Value::Array(items) => items.iter_mut().for_each(change),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use nido_api::ExecResult;
    use nido_api::SpawnRequest;
    use nido_api::VmInfo;

    use super::*;

    fn nowhere(schema: &Value, wrong: &dyn Fn(&Value) -> bool) {
        assert!(!wrong(schema), "{schema}");
        match schema {
            Value::Object(fields) => fields.values().for_each(|value| nowhere(value, wrong)),
            Value::Array(items) => items.iter().for_each(|item| nowhere(item, wrong)),
            _ => {}
        }
    }

    #[test]
    fn arguments_have_no_null_no_references_and_no_alternatives_at_their_root() {
        let schema = arguments::<SpawnRequest>();
        nowhere(&schema, &|part| part.get("$ref").is_some() || part == "null" || part.is_null());
        assert_eq!(schema["type"], "object");
        assert_eq!(schema["properties"]["net"]["type"], "string");
        assert!(schema["properties"]["net"]["description"].as_str().unwrap().starts_with("Network."));
    }

    #[test]
    fn no_input_schema_has_a_boolean_additional_properties() {
        // Google's Python SDK converts no tool that has one.
        for tool in crate::tools::ALL {
            nowhere(&(tool.takes)(), &|part| part.get("additionalProperties").is_some_and(Value::is_boolean));
        }
        let labels = &arguments::<SpawnRequest>()["properties"]["labels"];
        assert_eq!(labels["additionalProperties"]["type"], "string");
    }

    #[test]
    fn times_are_numbers_of_seconds() {
        let ttl = &arguments::<SpawnRequest>()["properties"]["ttl_seconds"];
        assert_eq!((&ttl["type"], &ttl["exclusiveMinimum"]), (&json!("number"), &json!(0)));
        assert!(ttl["description"].as_str().unwrap().contains("in seconds"), "{ttl}");
        nowhere(&arguments::<SpawnRequest>(), &|part| part.get("ttl_ms").is_some());
    }

    #[test]
    fn result_schemas_name_their_fields_with_one_type_each() {
        let schema = result::<VmInfo>();
        nowhere(&schema, &|part| part.get("type").is_some_and(Value::is_array) || part.get("anyOf").is_some());
        let fields = &schema["properties"];
        assert_eq!(
            (&fields["started_at"], &fields["forwards"]["type"]),
            (&json!({ "type": "string" }), &json!("array"))
        );
        assert_eq!(fields["failure"], json!({ "type": "object" }));
        assert_eq!(vm_or_job()["properties"]["job_id"]["type"], "string");
    }

    #[test]
    fn listed_arguments_have_no_bounds_and_leave_some_out() {
        let schema = listed(arguments::<SpawnRequest>(), &["machine"]);
        nowhere(&schema, &|part| part.get("pattern").is_some() || part["minimum"].is_number());
        assert!(schema["properties"].get("machine").is_none() && schema["properties"]["cpus"]["type"] == "integer");
    }

    #[test]
    fn composed_schemas_are_one_object() {
        let schema = whole::<ExecResult>();
        assert_eq!(schema["type"], "object");
        assert!(schema["properties"]["exit_code"].is_object() && schema["properties"]["stdout"].is_object());
        nowhere(&schema, &|part| part.get("$ref").is_some() || part.get("allOf").is_some());
    }
}
