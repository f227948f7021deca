//! Schemas of arguments and answers, made of the core's own types. Pure.
//!
//! The types' own descriptions are for OpenAPI. Agents want them differently: nothing to look up elsewhere, objects that
//! say that they take nothing else, and optional arguments that are simply not required: some clients refuse
//! `["string", "null"]`, and most models a schema that has alternatives at its root. What is `null` in an answer is said to be, but
//! with one type at a time.
//!
//! Invariant: arguments and answers are objects.

use serde_json::{Map, Value, json};
use utoipa::ToSchema;
use utoipa::openapi::{RefOr, Schema};

/// Words of OpenAPI that JSON Schema has no use for.
const NOT_OURS: [&str; 2] = ["example", "discriminator"];
/// What references begin with.
const PLACE: &str = "#/components/schemas/";

/// The schema of a tool's arguments.
#[must_use]
pub fn arguments<T: ToSchema>() -> Value {
    let mut schema = whole::<T>();
    without_null(&mut schema);
    closed(&mut schema);
    described_in_place(&mut schema);
    schema
}

/// The schema of a tool's answer: what it gives, or an error.
#[must_use]
pub fn answer<T: ToSchema>() -> Value {
    alternatives(vec![whole::<T>()])
}

/// The same of a tool that may take longer than a client waits: or a job.
#[must_use]
pub fn answer_or_job<T: ToSchema>() -> Value {
    alternatives(vec![whole::<T>(), whole::<crate::answer::JobBegun>()])
}

/// An object that is one of these, or an error.
#[must_use]
pub fn alternatives(mut schemas: Vec<Value>) -> Value {
    schemas.push(whole::<crate::answer::Failed>());
    schemas.iter_mut().for_each(one_type_each);
    json!({ "type": "object", "anyOf": schemas })
}

/// Says something else, or more, of arguments than their type does.
#[must_use]
pub fn told(mut schema: Value, words: &[(&str, &str)]) -> Value {
    for (name, description) in words {
        schema["properties"][name]["description"] = json!(description);
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
    if let Some(name) = schema.get("$ref").and_then(Value::as_str).and_then(|path| path.strip_prefix(PLACE)) {
        let mut part = parts.get(name).cloned().unwrap_or_else(|| json!({}));
        // What is said of the field is more to the point than what is said of its type.
        if let (Some(own), Some(part)) = (schema.as_object(), part.as_object_mut()) {
            part.extend(own.iter().filter(|(key, _)| *key != "$ref").map(|(key, value)| (key.clone(), value.clone())));
        }
        *schema = part;
    }
    match schema {
        Value::Object(fields) => {
            fields.retain(|key, value| {
                let said_twice = key == "propertyNames" && *value == json!({ "type": "string" });
                !NOT_OURS.contains(&key.as_str()) && !said_twice
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

/// What may be of several types as alternatives of one type each: some clients know no other way to say that something may be `null`.
fn one_type_each(schema: &mut Value) {
    each(schema, one_type_each);
    let Value::Object(fields) = schema else { return };
    let Some(Value::Array(kinds)) = fields.get("type").cloned() else { return };
    let constraints = std::mem::take(fields).into_iter();
    let (said, constraints): (Map<_, _>, Map<_, _>) =
        constraints.filter(|(key, _)| key != "type").partition(|(key, _)| key == "description" || key == "default");
    let of_kind = |kind: &Value| {
        let mut one = Map::from_iter([("type".to_owned(), kind.clone())]);
        if kind != "null" {
            one.extend(constraints.clone());
        }
        Value::Object(one)
    };
    fields.insert("anyOf".into(), kinds.iter().map(of_kind).collect());
    fields.extend(said);
}

/// Objects that list what they hold take nothing else.
fn closed(schema: &mut Value) {
    if let Value::Object(fields) = schema
        && fields.get("type").is_some_and(|kind| kind == "object")
        && !fields.contains_key("additionalProperties")
    {
        fields.entry("properties").or_insert_with(|| json!({}));
        fields.insert("additionalProperties".into(), json!(false));
    }
    each(schema, closed);
}

/// The type's own description tells a programmer what it is for.
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
    use nido_vmm::api::{ExecResult, SpawnRequest, VmInfo};

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
        assert_eq!((&schema["type"], &schema["additionalProperties"]), (&json!("object"), &json!(false)));
        assert_eq!(schema["properties"]["ttl_ms"]["type"], "integer");
        assert_eq!(schema["properties"]["net"]["enum"], json!(["nat", "none"]));
        assert_eq!(schema["properties"]["net"]["description"], "Network.");
        assert_eq!(schema["properties"]["forwards"]["items"]["additionalProperties"], false);
    }

    #[test]
    fn answers_say_null_only_of_what_is_null_and_as_a_type_of_its_own() {
        let schema = answer::<VmInfo>();
        nowhere(&schema, &|part| part.get("type").is_some_and(Value::is_array));
        let fields = &schema["anyOf"][0]["properties"];
        let started_at = json!([{ "type": "string", "format": "date-time" }, { "type": "null" }]);
        assert_eq!((&fields["started_at"]["anyOf"], fields["id"].get("anyOf")), (&started_at, None));
        assert!(fields["started_at"]["description"].is_string());
        // What is left out instead is never null.
        let error = &schema["anyOf"][1]["properties"]["error"]["properties"];
        assert_eq!(error["hint"]["type"], "string");
    }

    #[test]
    fn what_is_composed_is_one_object() {
        let schema = whole::<ExecResult>();
        assert_eq!(schema["type"], "object");
        assert!(schema["properties"]["exit_code"].is_object() && schema["properties"]["stdout"].is_object());
        nowhere(&schema, &|part| part.get("$ref").is_some() || part.get("allOf").is_some());
    }
}
